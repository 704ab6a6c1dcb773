"""Per-token log-probabilities -> language-model losses, as sums; the loop divides by the count of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tuner.registry import Registry

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss")


@LOSSES.register("nll")
def nll(logps: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood, summed: -Σ w_m log p(y_m); its denominator is Σ w_m. All `[M]` -> scalar."""
    return -(logps * weights).sum()


def resolve(name: str, parameters: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss called `name`, its recipe parameters checked and bound."""
    fn, bound = LOSSES.get(name), LOSSES.parameters(name, parameters)
    return lambda logps, weights: fn(logps, weights, **bound)
