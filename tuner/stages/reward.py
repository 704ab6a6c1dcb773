"""A recipe -> a reward model of what people preferred: full weights, LoRA or QLoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from tuner.losses import reward
from tuner.losses.bound import Bound
from tuner.losses.measures import correlation
from tuner.model.reward import RewardModel
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.stages.rows import fit_of
from tuner.types import Batch, Ranked, Tokens, on_device

METRICS = ("accuracy", "margin", "reward")
FEW_MARGINS = 5  # up to so many different ones each have a bucket of their own


@dataclass(frozen=True)
class Reward:
    """A loss over the ranked answers of each prompt; the prompt runs once, and all of its answers continue it.

    Metrics, each a mean over lists: `accuracy` (the share of the pairs of a list whose better answer has the higher
    reward; ties count half), `margin` (the mean of its pairs), and `reward` (the mean of its answers).

    Args:
        width: answers of the longest list.
    """

    loss: Bound
    width: int = 2
    whole_step: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.loss.terms)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        lists = float(len(samples))
        return self.loss.denominators(lists, chosen_tokens=0.0) | dict.fromkeys(METRICS, lists)

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        return self.whole_losses(self.scores(policy, batch, samples), self.constants(batch, samples))

    def scores(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """The rewards of each list, `[samples, width]`; zeros behind its last answer."""
        rewards = policy(batch)
        assert len(rewards) == sum(len(sample.branches) for sample in samples), "every answer has a token to score"
        table = rewards.new_zeros(len(samples), self.width)
        return table.index_put((batch.seq_doc, batch.seq_branch - 1), rewards)

    def constants(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """`[samples, 2 + width]`: answers of each list, its margin (NaN without one), tokens of each answer."""
        behind = [[0] * (self.width - len(sample.branches)) for sample in samples]
        rows = [[len(s.branches), _margin(s), *_tokens(s), *b] for s, b in zip(samples, behind, strict=True)]
        return on_device(rows, np.float32, batch.weights.device)

    def whole_losses(self, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
        ranked = self._ranked(scores, constants)
        sums = {term: values.sum() for term, values in self.loss(ranked).items()}
        with torch.no_grad():
            return sums | measure(ranked)

    def measures(self, scores: Tensor, constants: Tensor) -> dict[str, float]:
        """Of all pairs of all lists: how well their rewards predict them, and what length alone would.

        `calibration_error`; `longer_is_better` (the share of pairs whose better answer is the longer one; ties count
        half) and `reward_length_correlation` over answers; and where lists have margins, `margin_..._accuracy` and
        `margin_..._pairs` of each bucket of them.
        """
        ranked, lengths = self._ranked(scores, constants), constants[:, 2:]
        lists, better, worse = reward.pairs_of(ranked).nonzero(as_tuple=True)
        chosen, rejected = scores[lists, better], scores[lists, worse]
        there = reward.present(ranked)
        found: dict[str, float | None] = {
            "calibration_error": reward.calibration(chosen, rejected)[1],
            "longer_is_better": float(reward.accuracy(lengths[lists, better], lengths[lists, worse]).mean()),
            "reward_length_correlation": correlation(scores[there], lengths[there]),
        }
        with_margin = ~constants[:, 1].isnan()
        right = reward.accuracy(scores[with_margin, 0], scores[with_margin, 1])
        return {k: v for k, v in found.items() if v is not None} | _by_margin(right, constants[with_margin, 1])

    def _ranked(self, scores: Tensor, constants: Tensor) -> Ranked:
        margins = constants[:, 1] if "margins" in self.loss.needs else None
        return Ranked(scores, constants[:, 0].long(), margins)


def measure(ranked: Ranked) -> dict[str, Tensor]:
    """The metrics of lists, summed."""
    better, worse = ranked.rewards[:, :, None], ranked.rewards[:, None, :]
    rewards = torch.where(reward.present(ranked), ranked.rewards, 0.0)
    return {
        "accuracy": reward.mean_over_pairs(ranked, reward.accuracy(better, worse)).sum(),
        "margin": reward.mean_over_pairs(ranked, better - worse).sum(),
        "reward": (rewards.sum(1) / ranked.lengths).sum(),
    }


def _margin(sample: Tokens) -> float:
    """Of the better answer of a pair over the other, if the data says so; else NaN."""
    return sample.scores[0] - sample.scores[1] if sample.scores and len(sample.branches) == 2 else math.nan


def _tokens(sample: Tokens) -> list[int]:
    return [sum(len(span.ids) for span in branch) for branch in sample.branches]


def _by_margin(right: Tensor, margins: Tensor) -> dict[str, float]:
    """Accuracy and count of each bucket of margins: of each margin if there are few, else of each quarter of them."""
    values = margins.unique()  # sorted
    if len(values) > FEW_MARGINS:
        values = margins.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75])).unique()
    if len(values) < 2:
        return {}
    found: dict[str, float] = {}
    for name, (accuracy, pairs) in reward.by_margin(right, margins, values[1:].tolist()).items():
        key = name.replace("< ", "below_").replace(">= ", "from_").replace("..", "_to_")
        found |= {f"margin_{key}_accuracy": accuracy, f"margin_{key}_pairs": pairs} if pairs else {}
    return found


# --- the run ---


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_drift: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains a reward model on ranked answers as the recipe says and returns the summary that the manifest keeps.

    Raises:
        UserError: the recipe, data, model or output directory is wrong; nothing was changed.
        RunError, Interrupted: the run ended early; its last checkpoint is intact.
    """
    loss = reward.resolve(str(recipe.loss.type), recipe.loss.parameters)
    start = prepare.start(
        recipe, resume=resume, overwrite=overwrite or dry_run, accepts=("preference",), fit=fit_of(loss)
    )
    if dry_run:
        return prepare.report_dry_run(start)
    with prepare.open_run(start, resume, overwrite, allow_drift) as opened:
        if opened.finished:
            return dict(opened.summary)
        model = prepare.load_model(RewardModel, start, opened.base_sha256)
        splits = (start.data.train, start.data.held_out) if start.data.held_out else (start.data.train,)
        stage = Reward(loss, width=max(int(split.tokens.branches.max()) for split in splits))
        session = prepare.session(start, opened, model, stage)
        summary = session.train(opened.checkpoint)
    if start.machine.devices.is_main:
        report(start.recipe, summary, start.console)
    return summary


def report(recipe: Recipe, summary: Mapping[str, Any], console: Console) -> None:
    """The last lines a user reads: what the held-out accuracy is worth, and where the result lies."""
    after: dict[str, float] = {k.removeprefix("eval_"): v for k, v in summary["after"].items()}
    if "accuracy" in after:
        console.print(
            f"report   held-out accuracy {after['accuracy']:.1%}; chance 50.0%, the longer answer is the better one in "
            f"{after['longer_is_better']:.1%}"
        )
        parts = [f"calibration error {after['calibration_error']:.3f}"]
        if "reward_length_correlation" in after:
            parts.append(f"correlation of reward and length {after['reward_length_correlation']:+.2f}")
        console.print(f"         {'; '.join(parts)}")
        if buckets := [k for k in after if k.startswith("margin_") and k.endswith("_accuracy")]:
            shown = [_bucket(key, after) for key in buckets]
            console.print(f"         accuracy by margin: {'; '.join(shown)}")
    console.print(f"saved    {Path(recipe.train.output_dir) / summary['result']}")


def _bucket(key: str, after: Mapping[str, float]) -> str:
    name = key.removeprefix("margin_").removesuffix("_accuracy")
    return f"{name.replace('_', ' ')} {after[key]:.1%} of {after[f'margin_{name}_pairs']:.0f}"
