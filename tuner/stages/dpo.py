"""A recipe -> a policy that prefers what people preferred: DPO and its family, with full weights, LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.errors import DataError, RecipeError
from tuner.losses import preference
from tuner.losses.bound import Bound
from tuner.model.policy import Policy
from tuner.recipe import Recipe, ReferenceSection
from tuner.stages import prepare
from tuner.stages.judged import Judged, ProbingJudged
from tuner.stages.pairs import DPO
from tuner.stages.reference import ReferenceLogps, check_reference, make_reference
from tuner.stages.report import make_answers, preference_report
from tuner.stages.rows import fit_of
from tuner.stages.sft import report


def check_loss(recipe: Recipe, loss: Bound) -> None:
    """Refuses a section that the loss does not read, and what a loss that pairs rows with one another cannot have.

    Raises:
        RecipeError: a reference that nothing reads, steps of one row, or log-probs kept of what is made anew each step.
    """
    if "reference" not in loss.needs and recipe.reference != ReferenceSection():
        raise RecipeError(f"reference: loss '{loss.name}' compares with no reference; take the section out")
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
    """Trains a policy on pairs or labelled answers as the recipe says and returns the summary that the manifest keeps.

    Raises:
        UserError: the recipe, data, model or output directory is wrong; nothing was changed.
        RunError, Interrupted: the run ended early; its last checkpoint is intact.
    """
    loss = preference.resolve(str(recipe.loss.type), recipe.loss.parameters)
    check_loss(recipe, loss)
    start = prepare.start(
        recipe, resume=resume, overwrite=overwrite or dry_run, accepts=("preference",), fit=fit_of(loss)
    )
    recipe, machine, console, data = start.recipe, start.machine, start.console, start.data
    if loss.items == "unpaired" and (pairs := int((data.train.tokens.branches == 2).sum())):
        console.print(f"pairs    {pairs:,} rows are pairs: each gives loss '{loss.name}' a good and a bad answer")
    if "mismatched" in loss.needs and int(data.train.tokens.branches.sum()) < 2:
        raise DataError(
            f"data.train: one answer leaves loss '{loss.name}' no other for its KL estimate; give more rows"
        )
    check_reference(recipe, data)
    if dry_run:
        return prepare.report_dry_run(start)
    with prepare.open_run(start, resume, overwrite, allow_drift) as opened:
        if opened.finished:
            return dict(opened.summary)
        model = prepare.load_model(Policy, start, opened.base_sha256)
        reference, live = None, None
        if "reference" in loss.needs:
            reference, live = make_reference(recipe, machine, data, model.policy, console)
        answers = make_answers(recipe, machine, data, model, live, console)
        stage = stage_of(recipe, loss, reference)
        session = prepare.session(start, opened, model, stage, answers)
        summary = session.train(opened.checkpoint)
    if machine.devices.is_main:
        if data.held_out:
            measured = len(answers.measured) if answers else 0
            for line in preference_report(summary, *stage.compared(data.held_out.tokens), measured):
                console.print(line)
        report(recipe, summary, console)
    return summary
