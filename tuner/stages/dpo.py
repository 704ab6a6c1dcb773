"""A recipe -> a policy that prefers what people preferred: DPO and its family, with full weights, LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tuner.errors import RecipeError
from tuner.losses import preference
from tuner.losses.bound import Bound
from tuner.losses.measures import against_length
from tuner.losses.reward import accuracy
from tuner.losses.unpaired import kl_estimate, mismatches
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.stages.reference import ReferenceLogps, make_reference
from tuner.stages.report import make_answers, preference_report
from tuner.stages.rows import fit_of
from tuner.stages.sft import report
from tuner.types import Batch, Pairs, Scored, Span, Tokens, Unpaired

CHOSEN, REJECTED = 0, 1  # branches of a pair


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
        chosen = sum(span.weight * len(span.ids) for s in samples for span in s.branches[CHOSEN] if span.trained)
        return self.loss.denominators(pairs, chosen) | dict.fromkeys(METRICS, pairs)

    @property
    def whole_step(self) -> bool:
        return self.loss.scope == "step"

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        return self.whole_losses(self.scores(policy, batch, samples), self.constants(batch, samples))

    def scores(self, policy: Callable[..., Tensor], batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """What the loss reads of the policy, `[samples, 2]` for each name of `_learned`."""
        collided = "collision" in self._learned
        found = (policy(batch, collision=True) if collided else policy(batch)[None]) * batch.weights  # [1 or 2, M]
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
            columns.append(torch.tensor([[s.scores[CHOSEN] - s.scores[REJECTED]] for s in samples]).to(columns[0]))
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
        values = {f"{name}_logp": float(side.policy.double().mean()) for name, side in sides.items()}
        noise = 0.0
        if self.reference is not None:
            given = {name: side.reference for name, side in sides.items() if side.reference is not None}
            values |= {f"{name}_reference_logp": float(logps.double().mean()) for name, logps in given.items()}
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
        labels = [label for sample in samples for label in labels_of(sample)]
        kinds = {"desirable_reward": float(sum(labels)), "undesirable_reward": float(len(labels) - sum(labels))}
        kl = {"kl": float(len(labels))} if "mismatched" in self.loss.needs else {}
        return self.loss.denominators(float(len(labels)), 0.0) | {k: n for k, n in kinds.items() if n} | kl

    @property
    def whole_step(self) -> bool:
        return self.loss.scope == "step" and "mismatched" not in self.loss.needs

    def constants(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """The columns of pairs, then the labels, `[samples, 2]`; where there is no second answer, it has no tokens."""
        labels = torch.zeros(len(samples), 2)
        for row, sample in enumerate(samples):
            labels[row, : len(sample.branches)] = torch.tensor(labels_of(sample), dtype=torch.float32)
        found = super().constants(batch, samples)
        return torch.cat([found, labels.to(found)], dim=1)

    def whole_losses(self, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
        answers, desirable = self._answers(scores, constants)
        sums = {k: v.sum() for k, v in self.loss(Unpaired(answers, desirable, self.mismatched)).items()}
        ratio = answers.ratio.detach()
        sums |= {"desirable_reward": ratio[desirable].sum(), "undesirable_reward": ratio[~desirable].sum()}
        return sums if self.mismatched is None else sums | {"kl": kl_estimate(self.mismatched) * len(ratio)}

    def measures(self, scores: Tensor, constants: Tensor) -> dict[str, float]:
        answers, desirable = self._answers(scores, constants)
        good, bad = answers.ratio[desirable], answers.ratio[~desirable]
        if not len(good) or not len(bad):
            return {}
        ahead = good[:, None] - bad
        wins = (ahead > 0).double().mean() + 0.5 * (ahead == 0).double().mean()
        return {"accuracy": float(wins), "margin": float(good.double().mean() - bad.double().mean())}

    def _answers(self, scores: Tensor, constants: Tensor) -> tuple[Scored, Tensor]:
        """Every answer of the table, and whether it is a good one: `[R]` each."""
        pairs = self._pairs(scores, constants[:, :-2])
        both = Scored.cat([pairs.chosen, pairs.rejected])
        present = both.tokens > 0
        return both.take(present), torch.cat([*constants[:, -2:].split(1, dim=1)]).flatten()[present] > 0


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

    def informed(self, scores: Tensor, constants: Tensor) -> Judged:
        if not len(scores):
            nothing = torch.empty(0)
            return replace(self, mismatched=Scored(nothing, nothing, nothing))
        return replace(self, mismatched=self._answers(scores, constants)[0])


def labels_of(sample: Tokens) -> tuple[bool, ...]:
    """Which answers of a sample are good ones: by its label, or of a pair the chosen one."""
    return (True, False) if len(sample.branches) == 2 else (sample.scores[0] > 0,)


def _head(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The first `length` tokens of an answer."""
    out: list[Span] = []
    for part in spans:
        out.append(replace(part, ids=part.ids[: max(length, 0)]))
        length -= len(part.ids)
    return tuple(out)


METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
ROUNDING = 1e-6  # of a sum of log-probs in float32, relative


def measure(pairs: Pairs) -> dict[str, Tensor]:
    """The metrics of pairs, summed."""
    chosen, rejected = (_reward(side) for side in (pairs.chosen, pairs.rejected))
    return {
        "accuracy": accuracy(chosen, rejected).sum(),
        "margin": (chosen - rejected).sum(),
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
    }


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


# --- the run ---


def check_loss(recipe: Recipe, loss: Bound) -> None:
    """Refuses what a loss that pairs rows with one another cannot have.

    Raises:
        RecipeError: steps of one row, or log-probs kept of what is made anew in each step.
    """
    if "mismatched" not in loss.needs:
        return
    if recipe.train.batch_size == 1 and recipe.train.batch_unit == "examples":
        raise RecipeError(
            f"train.batch_size: 1 leaves loss '{loss.name}' no other row for its KL estimate; raise it to at least 2"
        )
    if recipe.reference.cache:
        raise RecipeError(
            f"reference.cache: loss '{loss.name}' scores answers after the prompts of other rows, which are others in "
            "every epoch, so they cannot be kept; set it to false"
        )


def stage_of(recipe: Recipe, loss: Bound, reference: ReferenceLogps | None) -> DPO:
    """What the loop minimises."""
    if loss.items == "pairs":
        return DPO(loss, reference)
    kind = ProbingJudged if "mismatched" in loss.needs else Judged
    return kind(loss, reference, recipe.data.max_length)


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_drift: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains a policy on pairs as the recipe says and returns the summary that the manifest keeps.

    Raises:
        UserError: the recipe, data, model or output directory is wrong; nothing was changed.
        RunError, Interrupted: the run ended early; its last checkpoint is intact.
    """
    loss = preference.resolve(str(recipe.loss.type), recipe.loss.parameters)
    check_loss(recipe, loss)
    machine = prepare.machine(recipe, resume=resume)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not machine.devices.is_main)
    recipe = machine.recipe
    prepare.check_start(recipe, machine.devices, resume=resume, overwrite=overwrite or dry_run)
    data = prepare.data(recipe, machine.devices, console, ("preference",), fit_of(loss))
    if loss.items == "unpaired" and (pairs := int((data.train.tokens.branches == 2).sum())):
        console.print(f"pairs    {pairs:,} rows are pairs: each gives loss '{loss.name}' a good and a bad answer")
    if dry_run:
        return prepare.report_dry_run(data, console)
    with prepare.open_run(recipe, machine, data, resume, overwrite, allow_drift, console) as opened:
        if opened.finished:
            console.print(f"{recipe.train.output_dir} has finished already; --overwrite would replace it")
            return dict(opened.summary)
        model = prepare.load_model(Policy, recipe, machine, data, opened.base_sha256, console)
        reference, live = None, None
        if "reference" in loss.needs:
            reference, live = make_reference(recipe, machine, data, model.policy, console)
        answers = make_answers(recipe, machine, data, model, live, console)
        stage = stage_of(recipe, loss, reference)
        session = prepare.session(recipe, machine, data, opened, model, stage, console, answers)
        summary = session.train(opened.checkpoint)
    if machine.devices.is_main:
        if data.held_out:
            measured = len(answers.measured) if answers else 0
            for line in preference_report(summary, len(data.held_out.tokens), measured):
                console.print(line)
        report(recipe, summary, console)
    return summary
