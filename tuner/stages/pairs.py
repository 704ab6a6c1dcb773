"""Pairs of answers -> what a preference loss reads of them, what it minimises, and the measures of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tuner.losses.bound import Bound
from tuner.losses.measures import against_length
from tuner.losses.reward import accuracy
from tuner.stages.reference import ReferenceLogps
from tuner.types import Batch, Pairs, Scored, Span, Tokens, on_device

CHOSEN, REJECTED = 0, 1  # branches of a pair
METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
ROUNDING = 1e-6  # of a sum of log-probs in float32, relative


@dataclass(frozen=True)
class DPO:
    """A preference loss over pairs; each prompt runs once, and both answers continue it.

    Metrics, each a mean over pairs: `accuracy` (the reward of the chosen answer is higher; ties count half), `margin`
    (of the rewards), and both rewards. The reward of an answer is its log-ratio to the reference, or for a loss
    without a reference its mean log-prob of a token.
    """

    loss: Bound
    reference: ReferenceLogps | None

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.loss.terms)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        pairs = float(len(samples))
        chosen = scored_tokens(sample.branches[CHOSEN] for sample in samples)
        return self.loss.denominators(pairs, chosen) | dict.fromkeys(METRICS, pairs)

    def compared(self, samples: Sequence[Tokens]) -> tuple[str, int]:
        """What held-out samples are, in words, and how many comparisons of two answers they give."""
        return f"{len(samples):,} held-out pairs", len(samples)

    @property
    def whole_step(self) -> bool:
        return self.loss.scope == "step"

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        return self.whole_losses(self.scores(policy, batch, samples), self.constants(batch, samples))

    def scores(self, policy: Callable[..., Tensor], batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """What the loss reads of the policy, `[samples, 2]` for each name of `_learned`."""
        collided = "collision" in self._learned
        found = policy(batch, measures=("collision",)) if collided else policy(batch)[None]
        found = found * batch.weights  # [1 or 2, M]
        columns = [_table(batch, found[0], len(samples))]
        if "shared" in self._learned:
            columns.append(_table(batch, found[0] * _within_shorter(batch, len(samples)), len(samples)))
        if collided:
            columns.append(_table(batch, found[1], len(samples)))
        return torch.cat(columns, dim=1)

    def constants(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """What it reads besides, `[samples, 2]` for each name of `_given`; then the margins, where it reads them."""
        columns = [_table(batch, batch.weights, len(samples))]
        if "reference" in self._given:
            assert self.reference is not None
            logps = self.reference(batch, samples) * batch.weights
            columns.append(_table(batch, logps, len(samples)))
            if "shared_reference" in self._given:
                columns.append(_table(batch, logps * _within_shorter(batch, len(samples)), len(samples)))
        if "margins" in self.loss.needs:
            margins = [[s.scores[CHOSEN] - s.scores[REJECTED]] for s in samples]
            columns.append(on_device(margins, np.float32, columns[0].device))
        return torch.cat(columns, dim=1)

    def whole_losses(self, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
        pairs = self._pairs(scores, constants)
        sums = {term: values.sum() for term, values in self.loss(pairs).items()}
        with torch.no_grad():
            return sums | measure(pairs)

    def measures(self, scores: Tensor, constants: Tensor) -> dict[str, float]:
        """Mean log-probs of an answer in nats, the reference's too, and its loss; and what length has to do with it.

        Log-ratios that are all 0, as before the first step, are correlated with nothing.
        """
        pairs = self._pairs(scores, constants)
        sides = {"chosen": pairs.chosen, "rejected": pairs.rejected}
        values = {name: value for kind, side in sides.items() for name, value in mean_logps(kind, side).items()}
        noise = 0.0
        if self.reference is not None:
            if "collision" not in self.loss.needs:  # which only the policy gives
                sums = self.whole_losses(constants[:, 2 : 2 + scores.shape[1]], constants)  # as if it were the policy
                counts = self.loss.denominators(len(scores), float(constants[:, CHOSEN].sum()))
                values["reference_loss"] = sum(float(sums[term]) / count for term, count in counts.items())
            noise = ROUNDING * float(scores.abs().mean())
        rewards = torch.stack([_reward(side) for side in sides.values()], dim=1)
        return values | against_length(rewards, constants[:, :2], noise)

    @property
    def _learned(self) -> tuple[str, ...]:
        return ("policy", *(name for name in ("shared", "collision") if name in self.loss.needs))

    @property
    def _given(self) -> tuple[str, ...]:
        shared = ("shared_reference",) if "shared" in self.loss.needs else ()
        return ("tokens", "reference", *shared) if "reference" in self.loss.needs else ("tokens",)

    def _pairs(self, scores: Tensor, constants: Tensor) -> Pairs:
        """The columns of the two tables as what a loss receives."""
        learned, given = ([*table.split(2, dim=1)] for table in (scores, constants))
        columns = dict(zip((*self._learned, *self._given), (*learned, *given), strict=False))
        sides = [Scored(**{name: column[:, side] for name, column in columns.items()}) for side in (CHOSEN, REJECTED)]
        return Pairs(sides[CHOSEN], sides[REJECTED], constants[:, -1] if "margins" in self.loss.needs else None)


def measure(pairs: Pairs) -> dict[str, Tensor]:
    """The metrics of pairs, summed."""
    chosen, rejected = (_reward(side) for side in (pairs.chosen, pairs.rejected))
    return {
        "accuracy": accuracy(chosen, rejected).sum(),
        "margin": (chosen - rejected).sum(),
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
    }


def mean_logps(kind: str, answers: Scored) -> dict[str, float]:
    """Mean log-prob of an answer in nats, and the reference's where there is one; names begin with `kind`."""
    values = {f"{kind}_logp": float(answers.policy.double().mean())}
    if answers.reference is not None:
        values[f"{kind}_reference_logp"] = float(answers.reference.double().mean())
    return values


def scored_tokens(answers: Iterable[Sequence[Span]]) -> float:
    """Tokens of answers that are scored, by their weights."""
    return sum(part.weight * len(part.ids) for answer in answers for part in answer if part.trained)


def _reward(side: Scored) -> Tensor:
    return side.policy / side.tokens if side.reference is None else side.ratio


# --- from predictions to pairs ---


def _within_shorter(batch: Batch, documents: int) -> Tensor:
    """`[M]`: 1 for the first n tokens of each answer, n being the length of the shorter one of the pair; else 0."""
    counts = batch.per_sequence(torch.ones_like(batch.weights))  # [S]
    rank = torch.arange(batch.num_predictions, device=counts.device) - (counts.cumsum(0) - counts)[batch.seq_ids]
    shorter = counts.new_zeros(documents, 2).index_put((batch.seq_doc, batch.seq_branch - 1), counts).amin(1)
    return (rank < shorter[batch.seq_doc[batch.seq_ids]]).float()


def _table(batch: Batch, values: Tensor, documents: int) -> Tensor:
    """Sums of per-prediction values `[M]` by document and branch, `[documents, 2]`."""
    sums = batch.per_sequence(values)
    return sums.new_zeros(documents, 2).index_put((batch.seq_doc, batch.seq_branch - 1), sums)
