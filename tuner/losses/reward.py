"""Rewards of ranked answers -> losses of a reward model, one value per list; and measures of such a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.losses.bound import Bound, Losses, Need, NonNegative, read_by, show_parameters
from tuner.types import Ranked

Formula = Callable[..., Tensor]

LOSSES = Losses("loss")


def resolve(name: str, parameters: Mapping[str, Any]) -> Bound:
    """The loss `name` of a reward model with the parameters of the recipe, checked and bound.

    Raises:
        RecipeError: no such loss, a parameter that it does not read, or a value out of its range.
    """
    return LOSSES.resolve(name, parameters)


def centred(ranked: Ranked, *, centring: NonNegative = 0.0) -> Tensor | None:
    """η mean_{i<j} (r_i + r_j)² of each list, `[L]`: keeps rewards around 0 (arXiv 2312.09244).

    For a pair it is η (r_w + r_l)², as in the paper; η = centring, 0.01 there.
    """
    if centring == 0:
        return None
    r = ranked.rewards
    return centring * mean_over_pairs(ranked, (r[:, :, None] + r[:, None, :]) ** 2)


def reward_loss(name: str) -> Callable[[Formula], Formula]:
    """Decorator that files a formula over `Ranked` under `name`; `centring` goes with all of them."""

    def add(formula: Formula) -> Formula:
        def bind(**parameters: Any) -> Bound:
            def compute(ranked: Ranked) -> dict[str, Tensor]:
                terms = {name: formula(ranked, **read_by(formula, parameters))}
                centre = centred(ranked, centring=parameters["centring"])
                return terms if centre is None else {**terms, "centring": centre}

            needs: list[Need] = ["margins"] if parameters.get("margin_weight") else []
            names = (name, "centring") if parameters["centring"] else (name,)
            return Bound(name, "ranked", "pair", frozenset(needs), dict.fromkeys(names, "items"), compute)

        show_parameters(bind, [formula, centred])
        bind.__name__ = name
        bind.__doc__ = formula.__doc__
        LOSSES.register(name, "pair", bind)
        return formula

    return add


def present(ranked: Ranked) -> Tensor:
    """Which places of the lists hold an answer, `[L, K]`."""
    return torch.arange(ranked.rewards.shape[1], device=ranked.lengths.device) < ranked.lengths[:, None]


def pairs_of(ranked: Ranked) -> Tensor:
    """Which [i, j] of the lists are a pair: both answers are there, and i is the better one; `[L, K, K]`."""
    there = present(ranked)
    return (there[:, :, None] & there[:, None, :]).triu(diagonal=1)


def mean_over_pairs(ranked: Ranked, values: Tensor) -> Tensor:
    """The mean of `values` `[L, K, K]` over the pairs i < j of each list, `[L]`."""
    counted = pairs_of(ranked)
    return torch.where(counted, values, 0.0).sum((1, 2)) / counted.sum((1, 2))


@reward_loss("bradley_terry")
def bradley_terry(ranked: Ranked, *, margin_weight: NonNegative = 0.0) -> Tensor:
    """Bradley-Terry with the margin of Llama 2 (arXiv 2307.09288, eq. 2): -log σ(r_w - r_l - m).

    m is the margin of the data times margin_weight; margins go with pairs. A list of K answers counts as the mean over
    its K(K-1)/2 pairs (arXiv 2203.02155, eq. 1).
    """
    r = ranked.rewards
    ahead = r[:, :, None] - r[:, None, :]  # [L, K, K]; of answer i over answer j
    if margin_weight:
        assert ranked.margins is not None and r.shape[1] == 2, "margins go with lists of two"
        ahead = ahead - margin_weight * ranked.margins[:, None, None]
    return mean_over_pairs(ranked, -logsigmoid(ahead))


@reward_loss("plackett_luce")
def plackett_luce(ranked: Ranked) -> Tensor:
    """Plackett-Luce (arXiv 2305.18290, appendix A.3): -Σ_k log [exp r_k / Σ_{j ≥ k} exp r_j], best first.

    For a pair it is Bradley-Terry without a margin.
    """
    there = present(ranked)
    r = ranked.rewards.masked_fill(~there, torch.finfo(ranked.rewards.dtype).min)
    still_in = r.flip(1).logcumsumexp(1).flip(1)  # [L, K]; log Σ_{j ≥ k} exp r_j
    return torch.where(there, still_in - r, 0.0).sum(1)


# ---- measures --------------------------------------------------------------------------------------------------------


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer scores higher, 0 where lower, ½ for a tie; `[P]`. Their mean is the accuracy."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def by_margin(values: Tensor, margins: Tensor, edges: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Bucket of margins -> (mean of the values there, how many). Empty buckets have mean NaN.

    Args:
        values, margins: `[P]`.
        edges: rising; a margin m is in bucket "a..b" if a <= m < b, and below the first or from the last edge on in
            "< a" and ">= b".
    """
    names = [f"< {edges[0]:g}", *(f"{a:g}..{b:g}" for a, b in zip(edges, edges[1:], strict=False)), f">= {edges[-1]:g}"]
    bucket = torch.bucketize(margins, torch.tensor(edges, dtype=margins.dtype, device=margins.device), right=True)
    counts = torch.bincount(bucket, minlength=len(names))
    sums = torch.bincount(bucket, weights=values.double(), minlength=len(names))
    return {n: (float(s / c), int(c)) for n, s, c in zip(names, sums, counts, strict=True)}


@dataclass(frozen=True)
class Bin:
    """Pairs whose preference was predicted with about the same confidence."""

    confidence: float  # mean of what was predicted, in [0.5, 1]
    accuracy: float  # how often it was right
    count: int


def calibration(chosen: Tensor, rejected: Tensor, bins: int = 10) -> tuple[tuple[Bin, ...], float]:
    """How often the answer that scores higher is the chosen one, against σ(|r_w - r_l|) which predicts it.

    Args:
        chosen, rejected: rewards, `[P]`.
        bins: equal parts of the confidences 0.5 to 1.

    Returns:
        The bins that are not empty, and the expected calibration error: the mean over pairs of
        |accuracy - confidence| of their bin (arXiv 1706.04599).
    """
    confidence = (chosen - rejected).abs().double().sigmoid()
    right = accuracy(chosen, rejected).double()
    bucket = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for i in bucket.unique().tolist():
        inside = bucket == i
        found.append(Bin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in found) / max(1, len(confidence))
    return tuple(found), error


def llama2_combined(helpfulness: Tensor, safety: Tensor, unsafe_prompt: Tensor, threshold: float = 0.15) -> Tensor:
    """The one score of two reward models by the rule of Llama 2 (arXiv 2307.09288, section 3.2.3), `[S]`.

    The safety score where the prompt is one that may elicit unsafe answers or where that score is below the threshold,
    else the helpfulness score. The paper compares probabilities, σ of the rewards, and takes the logit of the one it
    chose: which is its reward.

    Args:
        helpfulness, safety: rewards, `[S]`.
        unsafe_prompt: `[S]` bool.
        threshold: a probability, in (0, 1).

    Returns:
        The chosen rewards; the paper whitens them afterwards.
    """
    return torch.where(unsafe_prompt | (safety.sigmoid() < threshold), safety, helpfulness)


def whiten(values: Tensor) -> Tensor:
    """`[n]` with mean 0 and standard deviation 1 (of all n, not n - 1); zeros where they are all equal."""
    centred = values - values.mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(values)
