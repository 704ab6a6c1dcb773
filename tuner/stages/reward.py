"""A recipe -> a reward model of what people preferred: full weights, LoRA or QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tuner.data.report import place
from tuner.errors import DataError
from tuner.losses import reward
from tuner.losses.bound import Bound
from tuner.model.reward import RewardModel
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.types import Batch, Ranked, Tokens

METRICS = ("accuracy", "margin", "reward")


@dataclass(frozen=True)
class Reward:
    """A loss over the ranked answers of each prompt; the prompt runs once, and all of its answers continue it.

    Metrics, each a mean over lists: `accuracy` (of a list the share of its pairs whose better answer has the higher
    reward; ties count half), `margin` (the mean of its pairs), and `reward` (the mean of its answers).
    """

    loss: Bound

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.loss.terms)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        lists = float(len(samples))
        return self.loss.denominators(lists, 0.0) | dict.fromkeys(METRICS, lists)

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        ranked = Ranked(*lists_of(policy(batch), batch, len(samples)), self._margins(samples, batch.weights.device))
        sums = {term: values.sum() for term, values in self.loss(ranked).items()}
        with torch.no_grad():
            return sums | measure(ranked)

    def _margins(self, samples: Sequence[Tokens], device: torch.device) -> Tensor | None:
        if "margins" not in self.loss.needs:
            return None
        return torch.tensor([s.scores[0] - s.scores[1] for s in samples], device=device)


def lists_of(rewards: Tensor, batch: Batch, documents: int) -> tuple[Tensor, Tensor]:
    """Rewards `[S]` by document and branch, `[documents, K]`, and how many of them each document has."""
    lengths = torch.bincount(batch.seq_doc, minlength=documents)
    table = rewards.new_zeros(documents, int(batch.seq_branch.max()))
    return table.index_put((batch.seq_doc, batch.seq_branch - 1), rewards), lengths


def measure(ranked: Ranked) -> dict[str, Tensor]:
    """The metrics of lists, summed."""
    r = ranked.rewards
    right = reward.accuracy(r[:, :, None], r[:, None, :])
    present = torch.arange(r.shape[1], device=r.device) < ranked.lengths[:, None]
    return {
        "accuracy": reward.mean_over_pairs(ranked, right).sum(),
        "margin": reward.mean_over_pairs(ranked, r[:, :, None] - r[:, None, :]).sum(),
        "reward": (torch.where(present, r, 0.0).sum(1) / ranked.lengths).sum(),
    }
