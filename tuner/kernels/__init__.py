"""Op name -> the function of the backend in use; every op has a plain-torch reference beside any faster twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from tuner.errors import RecipeError
from tuner.kernels.token_logps import reference as token_logps_reference

Kernels = Mapping[str, Callable[..., Tensor]]

BACKENDS: Mapping[str, Kernels] = MappingProxyType(
    {"reference": MappingProxyType({"token_logps": token_logps_reference.token_logps})}
)


def resolve_backend(name: str) -> str:
    """`auto` -> the quickest backend there is; an explicit name is used or refused, never replaced in silence."""
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise RecipeError(f"model.kernels: '{name}' is not available here; use 'auto' or one of: {', '.join(BACKENDS)}")
    return name
