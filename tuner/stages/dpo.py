"""A recipe -> a policy that prefers what people preferred: DPO and its family, with full weights, LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tuner.data.report import place
from tuner.errors import DataError, RecipeError
from tuner.losses import preference
from tuner.losses.bound import Bound
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.stages.reference import ReferenceLogps, make_reference
from tuner.stages.sft import report
from tuner.types import Batch, Pairs, Scored, Tokens

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

    def scores(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """What the loss reads of the policy, `[samples, 2]` for each name of `_learned`."""
        logps = policy(batch) * batch.weights
        columns = [_table(batch, logps, len(samples))]
        if "shared" in self.loss.needs:
            columns.append(_table(batch, logps * _within_shorter(batch, len(samples)), len(samples)))
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
        return {}

    @property
    def _learned(self) -> tuple[str, ...]:
        return ("policy", "shared") if "shared" in self.loss.needs else ("policy",)

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


METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


def measure(pairs: Pairs) -> dict[str, Tensor]:
    """The metrics of pairs, summed."""
    chosen, rejected = (_reward(side) for side in (pairs.chosen, pairs.rejected))
    better = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {
        "accuracy": better.sum(),
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


def check_pairs(samples: Sequence[Tokens], loss: Bound, what: str) -> None:
    """Refuses samples that are no pairs, and data without the margins that the loss reads.

    Raises:
        DataError: names the row.
    """
    for sample in samples:
        where = f"{what}: {place(sample.source, sample.row)}"
        if len(sample.branches) != 2:
            raise DataError(
                f"{where} has {len(sample.branches)} answers, and this loss compares pairs; give rows with chosen and "
                "rejected"
            )
        if "margins" in loss.needs and not sample.scores:
            raise DataError(
                f"{where} says no margin, which loss '{loss.name}' with these parameters reads from every row; add a "
                "column 'margin', or leave the parameter out"
            )


def resolve_loss(name: str, parameters: Mapping[str, Any]) -> Bound:
    """The loss of a recipe, if this stage can bring what it needs.

    Raises:
        RecipeError: no such loss or parameter, or one over rows of another kind.
    """
    loss = preference.resolve(name, parameters)
    if loss.items != "pairs":
        raise RecipeError(
            f"loss.type: '{name}' reads single labelled answers, and `tuner dpo` reads pairs; choose another"
        )
    if "collision" in loss.needs:
        raise RecipeError("loss.wpo: 'sampled' needs the whole distribution at every token; choose another weighting")
    return loss


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
    loss = resolve_loss(str(recipe.loss.type), recipe.loss.parameters)
    machine = prepare.machine(recipe, resume=resume)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not machine.devices.is_main)
    recipe = machine.recipe
    prepare.check_start(recipe, machine.devices, resume=resume, overwrite=overwrite or dry_run)
    data = prepare.data(recipe, machine.devices, console, accepts=("preference",))
    check_pairs(data.train.tokens, loss, "data.train")
    check_pairs(data.held_out.tokens if data.held_out else (), loss, "data.eval")
    if dry_run:
        return prepare.report_dry_run(data, console)
    with prepare.open_run(recipe, machine, data, resume, overwrite, allow_drift, console) as opened:
        if opened.finished:
            console.print(f"{recipe.train.output_dir} has finished already; --overwrite would replace it")
            return dict(opened.summary)
        model = prepare.load_model(Policy, recipe, machine, data, opened.base_sha256, console)
        reference = make_reference(recipe, machine, data, model.policy, console) if "reference" in loss.needs else None
        session = prepare.session(recipe, machine, data, opened, model, DPO(loss, reference), console)
        summary = session.train(opened.checkpoint)
    if machine.devices.is_main:
        report(recipe, summary, console)
    return summary
