"""Rewards and lengths of answers -> what a report says of them beside the loss. Plain arithmetic, without gradient.

An accuracy means something only beside what length alone would get, so the baselines stand here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tuner.losses.reward import accuracy

STANDARD_ERRORS = 2.0  # what lies further off is hardly chance: about 1 in 20


def correlation(x: Tensor, y: Tensor, noise: float = 0.0) -> float | None:
    """Pearson's r of two `[A]`: Σ(x - x̄)(y - ȳ) / √(Σ(x - x̄)² Σ(y - ȳ)²).

    None where one of them is constant and r means nothing; `x` counts as constant if it spreads no wider than `noise`.
    """
    x, y = x.double(), y.double()
    if x.numel() < 2 or float(x.max() - x.min()) <= noise or float(y.max() - y.min()) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `[A]` and its standard error, s / √A; None for a single value, which says nothing of its spread."""
    values = values.double()
    error = float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else None
    return float(values.mean()), error


def against_length(rewards: Tensor, tokens: Tensor, noise: float = 0.0) -> dict[str, float]:
    """What the lengths of answers have to do with their rewards, and with being preferred.

    Args:
        rewards, tokens: of P pairs, `[P, 2]`: the chosen answer first. noise: as in `correlation`.

    Returns:
        `chosen_tokens`, `rejected_tokens`: means. `longer_is_better`: the share of pairs whose chosen answer is the
        longer one, ties half; so the accuracy of that rule. `reward_length_correlation`: over all 2P answers; and its
        baseline `preferred_length_correlation`, of being the chosen one (1 or 0). What is undefined is left out.
    """
    preferred = torch.tensor([1.0, 0.0]).expand_as(tokens)
    correlations = {
        "reward_length_correlation": correlation(rewards.flatten(), tokens.flatten(), noise),
        "preferred_length_correlation": correlation(preferred.flatten(), tokens.flatten()),
    }
    return {
        "chosen_tokens": float(tokens[:, 0].double().mean()),
        "rejected_tokens": float(tokens[:, 1].double().mean()),
        "longer_is_better": float(accuracy(tokens[:, 0], tokens[:, 1]).mean()),
    } | {name: value for name, value in correlations.items() if value is not None}


def length_explains(share: float, length_share: float, pairs: int) -> bool:
    """Whether an accuracy on held-out pairs may be one of length alone.

    It may if always to prefer the longer answer, or always the shorter one, is better than chance, and the accuracy is
    no better than that: each by more than two standard errors of such a share of `pairs`.

    Args:
        share: of the pairs that the policy gets right. length_share: of those whose longer answer is the chosen one.
    """
    by_length = max(length_share, 1 - length_share)
    of_chance = STANDARD_ERRORS * math.sqrt(0.25 / pairs)
    of_length = STANDARD_ERRORS * math.sqrt(by_length * (1 - by_length) / pairs)
    return by_length > 0.5 + of_chance and share <= by_length + of_length
