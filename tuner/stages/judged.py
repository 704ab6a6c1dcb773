"""Single answers, each labelled good or bad -> what a loss reads of them and minimises, and the measures of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tuner.losses.measures import ahead, labels_against_length
from tuner.losses.reward import accuracy
from tuner.losses.unpaired import kl_estimate, mismatches
from tuner.stages.pairs import DPO, ROUNDING, mean_logps, scored_tokens
from tuner.types import Batch, Scored, Span, Tokens, Unpaired, on_device


@dataclass(frozen=True, eq=False)
class Places:
    """Where the R answers are in a table of two columns, laid one column after the other; and which are good and bad.

    As lists of places, which the host knows, for to ask the device which entries of a mask are set would be to wait.
    """

    answers: Tensor  # [R]
    good: Tensor  # [G], of the R
    bad: Tensor  # [B], of the R


@dataclass(frozen=True)
class Judged(DPO):
    """A loss over single answers, each labelled good or bad; of a pair both are read, after the prompt that they share.

    Metrics: the mean reward of the good and of the bad answers, each over their own number, and the estimate of the KL
    to the reference that KTO subtracts. An evaluation adds their difference, and as `accuracy` how often a good answer
    has a higher reward than a bad one, of all such couples (ties count half).

    Args:
        max_length: of a prompt with the answer of another row, in tokens; the answer is cut there.
        mismatched: answers of the step, each scored after the prompt of another row; None before they are known.
    """

    max_length: int = 2048
    mismatched: Scored | None = None

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        labels = [label for sample in samples for label in sample.labels]
        kinds = {"desirable_reward": float(sum(labels)), "undesirable_reward": float(len(labels) - sum(labels))}
        estimate = {"kl_estimate": float(len(labels))} if "mismatched" in self.loss.needs else {}
        good = scored_tokens(
            branch for s in samples for branch, label in zip(s.branches, s.labels, strict=True) if label
        )
        # without good answers the NLL term of the step is 0, whatever it is divided by
        counts = self.loss.denominators(float(len(labels)), good or 1.0)
        return counts | {name: count for name, count in kinds.items() if count} | estimate

    def compared(self, samples: Sequence[Tokens]) -> tuple[str, int]:
        """What held-out samples are, in words, and how many couples of a good and a bad answer share no answer."""
        labels = [label for sample in samples for label in sample.labels]
        good, bad = sum(labels), len(labels) - sum(labels)
        return f"{good:,} good and {bad:,} bad held-out answers", min(good, bad)

    @property
    def whole_step(self) -> bool:
        return self.loss.scope == "step" and "mismatched" not in self.loss.needs

    def constants(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """The columns of pairs, then the labels, `[samples, 2]`; where there is no second answer, it has no tokens."""
        labels = [[*map(float, sample.labels), 0.0][:2] for sample in samples]
        found = super().constants(batch, samples)
        return torch.cat([found, on_device(labels, np.float32, found.device)], dim=1)

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        places = _listed(batch.sequences, [sample.labels for sample in samples], batch.weights.device)
        return self._losses(self.scores(policy, batch, samples), self.constants(batch, samples), places)

    def whole_losses(self, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
        return self._losses(scores, constants, _found(constants))

    def _losses(self, scores: Tensor, constants: Tensor, places: Places) -> dict[str, Tensor]:
        answers, desirable = self._answers(scores, constants, places.answers)
        sums = {k: v.sum() for k, v in self.loss(Unpaired(answers, desirable, self.mismatched)).items()}
        ratio = answers.ratio.detach()
        sums |= {"desirable_reward": ratio[places.good].sum(), "undesirable_reward": ratio[places.bad].sum()}
        if self.mismatched is not None:
            sums["kl_estimate"] = kl_estimate(self.mismatched).to(ratio) * len(ratio)
        return sums

    def measures(self, scores: Tensor, constants: Tensor) -> dict[str, float]:
        """Mean log-probs of an answer in nats, the reference's too, and its loss; and how good and bad answers compare.

        `accuracy` is of all couples, which compares answers to different prompts too, `pair_accuracy` of those that the
        data pairs. What needs both kinds is left out where there is one; log-ratios that are all 0 are correlated with
        nothing.
        """
        places = _found(constants)
        answers, desirable = self._answers(scores, constants, places.answers)
        good, bad = answers.take(places.good), answers.take(places.bad)
        kinds = {name: kind for name, kind in (("desirable", good), ("undesirable", bad)) if len(kind.policy)}
        values = {k: value for name, kind in kinds.items() for k, value in mean_logps(name, kind).items()}
        values["reference_loss"] = self._reference_loss(answers, desirable)
        if len(kinds) == 2:
            values["accuracy"] = ahead(good.ratio, bad.ratio)
            values["margin"] = float(good.ratio.double().mean() - bad.ratio.double().mean())
        pairs = self._pairs(scores, constants[:, :-2])
        whole = (pairs.chosen.tokens > 0) & (pairs.rejected.tokens > 0)  # else a row of one answer
        if whole.any():
            right = accuracy(pairs.chosen.ratio[whole], pairs.rejected.ratio[whole])
            values["pair_accuracy"] = float(right.double().mean())
        noise = ROUNDING * float(answers.policy.abs().mean())
        return values | labels_against_length(answers.ratio, answers.tokens, desirable, noise)

    def _reference_loss(self, answers: Scored, desirable: Tensor) -> float:
        """The loss as if the reference were the policy."""

        def of_reference(scored: Scored) -> Scored:
            assert scored.reference is not None
            return replace(scored, policy=scored.reference)

        others = None if self.mismatched is None else of_reference(self.mismatched)
        values = self.loss(Unpaired(of_reference(answers), desirable, others))
        counts = self.loss.denominators(len(desirable), float(answers.tokens[desirable].sum()) or 1.0)
        return sum(float(values[term].sum()) / count for term, count in counts.items())

    def _answers(self, scores: Tensor, constants: Tensor, places: Tensor) -> tuple[Scored, Tensor]:
        """The answers at `places` of the table, and whether each is a good one: `[R]` each."""
        pairs = self._pairs(scores, constants[:, :-2])
        labels = torch.cat([*constants[:, -2:].split(1, dim=1)]).flatten()
        return Scored.cat([pairs.chosen, pairs.rejected]).take(places), labels[places] > 0


def _listed(answers: Sequence[tuple[int, int]], labels: Sequence[Sequence[bool]], device: torch.device) -> Places:
    """The places of scored answers (row, branch) of a table of rows with such labels."""
    places = sorted(((branch - 1) * len(labels) + row, labels[row][branch - 1]) for row, branch in answers)
    kinds = [[i for i, (_, label) in enumerate(places) if label is kind] for kind in (True, False)]
    return Places(*(on_device(found, np.int64, device) for found in ([place for place, _ in places], *kinds)))


def _found(constants: Tensor) -> Places:
    """The same by looking at a table: an answer that is not there has no tokens."""
    tokens, labels = ([*columns.split(1, dim=1)] for columns in (constants[:, :2], constants[:, -2:]))
    answers = torch.cat(tokens).flatten().nonzero()[:, 0]
    good = torch.cat(labels).flatten()[answers] > 0
    return Places(answers, good.nonzero()[:, 0], (~good).nonzero()[:, 0])


@dataclass(frozen=True)
class ProbingJudged(Judged):
    """A loss that reads the KL estimate of the step (KTO): answers are scored after the prompts of other rows first."""

    def probes(self, samples: Sequence[Tokens]) -> list[Tokens]:
        """The prompts of a step, each with the answers that `mismatches` deals to it in the place of its own."""
        whole = list(samples)
        rows = [(n, branch) for n, sample in enumerate(whole) for branch in sample.branches]
        trunks = [tuple(int(i) for span in sample.trunk for i in span.ids) for sample in whole]
        dealt: dict[int, list[tuple[Span, ...]]] = {}
        for i, j in mismatches([trunks[n] for n, _ in rows]):
            n = rows[i][0]
            dealt.setdefault(n, []).append(_head(rows[j][1], self.max_length - len(trunks[n])))
        # a probe has no label, and a score only because an answer has one
        return [replace(whole[n], branches=tuple(answers), scores=(0.0,)) for n, answers in dealt.items()]

    def informed(self, scores: Tensor, constants: Tensor, answers: Sequence[tuple[int, int]]) -> Judged:
        if not len(scores):
            nothing = torch.empty(0)
            return replace(self, mismatched=Scored(nothing, nothing, nothing))
        places = _listed(answers, [(False, False)] * len(scores), scores.device)
        return replace(self, mismatched=self._answers(scores, constants, places.answers)[0])


def _head(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The first `length` tokens of an answer."""
    out: list[Span] = []
    for part in spans:
        out.append(replace(part, ids=part.ids[: max(length, 0)]))
        length -= len(part.ids)
    return tuple(out)
