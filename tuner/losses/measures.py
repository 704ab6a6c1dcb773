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
    return {
        "chosen_tokens": float(tokens[:, 0].double().mean()),
        "rejected_tokens": float(tokens[:, 1].double().mean()),
        "longer_is_better": float(accuracy(tokens[:, 0], tokens[:, 1]).mean()),
    } | _correlations(rewards.flatten(), tokens.flatten(), preferred.flatten(), noise)


def labels_against_length(rewards: Tensor, tokens: Tensor, good: Tensor, noise: float = 0.0) -> dict[str, float]:
    """The same of answers that are each labelled good or bad.

    Args:
        rewards, tokens, good: of A answers, `[A]`. noise: as in `correlation`.

    Returns:
        `desirable_tokens`, `undesirable_tokens`: means. `longer_is_better`: the share of all couples of a good and a
        bad answer whose good one is the longer one, ties half. And the two correlations of `against_length`, where the
        preferred answers are the good ones. What is undefined is left out.
    """
    kinds = {"desirable_tokens": tokens[good], "undesirable_tokens": tokens[~good]}
    values = {name: float(kind.double().mean()) for name, kind in kinds.items() if len(kind)}
    if len(values) == 2:
        values["longer_is_better"] = ahead(*kinds.values())
    return values | _correlations(rewards, tokens, good.double(), noise)


def _correlations(rewards: Tensor, tokens: Tensor, preferred: Tensor, noise: float) -> dict[str, float]:
    """Of reward and length, and of being preferred (1 or 0) and length; all `[A]`."""
    found = {
        "reward_length_correlation": correlation(rewards, tokens, noise),
        "preferred_length_correlation": correlation(preferred, tokens),
    }
    return {name: value for name, value in found.items() if value is not None}


def ahead(good: Tensor, bad: Tensor) -> float:
    """How often a value of `[G]` exceeds one of `[B]`, of all G·B couples, ties half: the area under the ROC curve."""
    ordered = bad.sort().values
    below, not_above = (torch.searchsorted(ordered, good, right=right) for right in (False, True))
    return float((below + not_above).double().mean()) / (2 * len(bad))


def length_explains(share: float, length_share: float, pairs: int) -> bool:
    """Whether an accuracy on held-out answers may be one of length alone.

    It may if always to prefer the longer answer, or always the shorter one, is better than chance, and the accuracy is
    no better than that: each by more than two standard errors of such a share of `pairs`.

    Args:
        share: of the pairs that the policy gets right. length_share: of those whose longer answer is the chosen one.
            pairs: of which no two share an answer; over all couples of good and bad answers such shares vary no more
            than over as many pairs as fit among them.
    """
    by_length = max(length_share, 1 - length_share)
    of_chance = STANDARD_ERRORS * math.sqrt(0.25 / pairs)
    of_length = STANDARD_ERRORS * math.sqrt(by_length * (1 - by_length) / pairs)
    return by_length > 0.5 + of_chance and share <= by_length + of_length
