"""Options that go with several preference losses: what they do to the log-probs before the formula, or to its value.

They apply in this order: `desensitized` (LD-DPO), `diverged` (f-DPO), `averaged` (length normalisation), then the
formula, then `policy_weights` (WPO). `chosen_nll` adds a term of its own, and so does `desirable_nll` to the losses
over single answers.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.errors import RecipeError
from tuner.losses.bound import Fraction, NonNegative
from tuner.types import Pairs, Scored, Unpaired


def desensitized(pairs: Pairs, *, ld_alpha: Fraction = 1.0) -> Pairs:
    """LD-DPO (arXiv 2409.06411): log π̂(y) = Σ_{t ≤ n} log π(y_t) + α Σ_{t > n} log π(y_t).

    n = min(|y_w|, |y_l|); under policy and reference. What one answer is longer than the other counts α; α = 1 is the
    plain sum.
    """
    if ld_alpha == 1.0:
        return pairs

    def cut(y: Scored) -> Scored:
        assert y.shared is not None and y.reference is not None and y.shared_reference is not None
        policy = ld_alpha * y.policy + (1 - ld_alpha) * y.shared
        return replace(y, policy=policy, reference=ld_alpha * y.reference + (1 - ld_alpha) * y.shared_reference)

    return replace(pairs, chosen=cut(pairs.chosen), rejected=cut(pairs.rejected))


def diverged(
    pairs: Pairs,
    *,
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    f_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None,
) -> Pairs:
    """f-DPO (arXiv 2309.16240): the log-ratio log u gives way to f'(u), u = π(y|x) / π_ref(y|x).

    reverse_kl: log u (DPO); forward_kl: 1 - 1/u; js: log 2u/(1 + u); alpha: (1 - u^-α)/α, which is between the first
    two (α -> 0 and α -> 1). Constants are chosen so that f'(1) = 0; they cancel between the two answers.
    """
    if f_divergence == "reverse_kl":
        return pairs

    def slope(y: Scored) -> Scored:
        log_u = y.ratio
        if f_divergence == "forward_kl":
            value = -torch.expm1(-log_u)
        elif f_divergence == "js":
            value = log(2) + logsigmoid(log_u)
        else:
            assert f_alpha is not None
            value = -torch.expm1(-f_alpha * log_u) / f_alpha
        return replace(y, policy=value, reference=torch.zeros_like(value))

    return replace(pairs, chosen=slope(pairs.chosen), rejected=slope(pairs.rejected))


def check_divergence(name: str, f_divergence: str, f_alpha: float | None) -> None:
    """Refuses an alpha that is not read, and a divergence that lacks it."""
    if f_divergence == "alpha" and f_alpha is None:
        raise RecipeError(
            f"loss '{name}': f_divergence: alpha needs f_alpha, above 0 (reverse KL) and below 1 (forward KL)"
        )
    if f_divergence != "alpha" and f_alpha is not None:
        raise RecipeError(
            f"loss '{name}': f_alpha={f_alpha} is read with f_divergence: alpha only; take it out, or set that"
        )


def averaged(pairs: Pairs, *, length_normalized: bool = False) -> Pairs:
    """Length-normalised DPO (arXiv 2411.15124): log-probs are averages over the tokens of each answer."""
    if not length_normalized:
        return pairs

    def mean(y: Scored) -> Scored:
        assert y.reference is not None
        return replace(y, policy=y.policy / y.tokens, reference=y.reference / y.tokens)

    return replace(pairs, chosen=mean(pairs.chosen), rejected=mean(pairs.rejected))


def policy_weights(pairs: Pairs, *, wpo: Literal["none", "plain", "sampled"] = "none") -> Tensor | None:
    """WPO (arXiv 2406.11827, eq. 2): the factor w(y_w) w(y_l) of each pair `[P]`, without gradient.

    plain: w(y) = exp mean_t log π(y_t); sampled: w(y) = exp mean_t (log π(y_t) - log Σ_v π(v)²), which is near 1
    for an answer that the policy would have sampled (the alignment that the paper recommends).
    """
    if wpo == "none":
        return None

    def weight(y: Scored) -> Tensor:
        total = y.policy.detach()
        if wpo == "sampled":
            assert y.collision is not None
            total = total - y.collision
        return torch.exp(total / y.tokens)

    return weight(pairs.chosen) * weight(pairs.rejected)


def chosen_nll(pairs: Pairs, *, nll_weight: NonNegative = 0.0) -> Tensor | None:
    """-w log π(y_w), `[P]`: the term that keeps the chosen answers likely, divided by their tokens over the step.

    RPO (arXiv 2404.19733, eq. 1, which averages within each answer), and 0.2 in Llama 3 (arXiv 2407.21783, 4.1.4).
    """
    return None if nll_weight == 0 else -nll_weight * pairs.chosen.policy


def desirable_nll(rows: Unpaired, *, nll_weight: NonNegative = 0.0) -> Tensor | None:
    """-w log π(y) of good answers and 0 of bad ones, `[R]`: divided by the tokens of the good ones over the step.

    `chosen_nll` for answers that stand alone. What only lowers bad answers may end in text that is neither.
    """
    return None if nll_weight == 0 else -nll_weight * torch.where(rows.desirable, rows.answers.policy, 0.0)
