"""A recipe -> a fine-tuned adapter or model: supervised fine-tuning, full weights, LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from tuner.data.pack import weight_sum
from tuner.losses import language
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.types import Batch, Tokens

# What an evaluation reports beside the loss, by the same weights: the share of tokens that greedy decoding would say,
# and the mean entropy of the predictions, in nats.
MEASURES = {"token_accuracy": "top1", "entropy": "entropy"}


@dataclass(frozen=True)
class SFT:
    """Negative log-likelihood of the trained tokens, divided by the sum of their weights over the optimizer step."""

    loss: Callable[[Tensor, Tensor], Tensor]
    measures: Mapping[str, str] = field(default_factory=dict)  # metric -> what the policy calls it
    terms: tuple[str, ...] = ("nll",)

    def measuring(self) -> SFT:
        return replace(self, measures=MEASURES)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        return dict.fromkeys((*self.terms, *self.measures), sum(weight_sum(sample) for sample in samples))

    def losses(self, policy: Callable[..., Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        if not self.measures:
            return {"nll": self.loss(policy(batch), batch.weights)}
        logps, *values = policy(batch, measures=tuple(self.measures.values()))
        sums = ((value * batch.weights).sum() for value in values)
        return {"nll": self.loss(logps, batch.weights), **dict(zip(self.measures, sums, strict=True))}


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_drift: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Fine-tunes as the recipe says and returns the summary that the manifest keeps.

    Raises:
        UserError: the recipe, data, model or output directory is wrong; nothing was changed.
        RunError, Interrupted: the run ended early; its last checkpoint is intact.
    """
    stage = SFT(language.resolve(str(recipe.loss.type), recipe.loss.parameters))
    start = prepare.start(recipe, resume=resume, overwrite=overwrite or dry_run)
    if dry_run:
        return prepare.report_dry_run(start)
    with prepare.open_run(start, resume, overwrite, allow_drift) as opened:
        if opened.finished:
            return dict(opened.summary)
        model = prepare.load_model(Policy, start, opened.base_sha256)
        session = prepare.session(start, opened, model, stage)
        summary = session.train(opened.checkpoint)
    if start.machine.devices.is_main:
        report(start.recipe, summary, start.console)
    return summary


def report(recipe: Recipe, summary: dict[str, Any], console: Console) -> None:
    """The last lines a user reads: where the result lies and what to do with it."""
    directory = Path(recipe.train.output_dir)
    console.print(f"saved    {directory / summary['result']}")
    if recipe.adapter is not None:
        console.print(f"next     tuner merge --adapter {directory}")
    else:
        console.print(f"next     tuner generate --model {directory / summary['result']} --prompt '...'")
