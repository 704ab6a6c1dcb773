"""A backend -> the functions that a run computes with; every op has a plain-torch reference beside any faster twin.

One folder is one op. Its `reference.py` and its `triton.py` hold functions of the same names and signatures; only the
backend that is chosen is imported. Attention has more implementations than these two; `attention/` lists them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tuner.errors import RecipeError
from tuner.kernels import attention

# Function -> the folder that it lives in.
OPS: Mapping[str, str] = MappingProxyType(
    {
        "token_logps": "token_logps",
        "rms_norm": "rms_norm",
        "add_rms_norm": "rms_norm",
        "rope": "rope",
        "swiglu": "swiglu",
        "lora_linears": "lora_linear",
        "swiglu_lora_linear": "lora_linear",
        "dequantize_nf4": "dequantize_nf4",
    }
)
BACKENDS = ("reference", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported, and runs on CPUs then


@dataclass(frozen=True)
class Kernels:
    """The functions of one run; what each takes and gives stands in its `reference.py`."""

    backend: str
    attention: attention.Attention
    token_logps: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    lora_linears: Callable[..., tuple[Tensor, ...]]
    swiglu_lora_linear: Callable[..., Tensor]
    dequantize_nf4: Callable[..., Tensor]

    def __deepcopy__(self, _: dict[int, Any]) -> Kernels:
        return self  # a copy of a model computes with the same functions


@cache
def load(backend: str = "reference", attention_name: str = attention.REFERENCE) -> Kernels:
    """The functions of a backend that `resolve_backend` gave, and the attention that `attention.resolve` gave."""
    if attention_name not in attention.IMPLEMENTATIONS:  # sdpa and eager run inside of transformers
        attention_name = attention.REFERENCE
    functions = {op: getattr(import_module(f"{__name__}.{home}.{backend}"), op) for op, home in OPS.items()}
    assert {*functions, "backend", "attention"} == {field.name for field in fields(Kernels)}
    return Kernels(backend=backend, attention=attention.load(attention_name), **functions)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, as part of a sentence; None where they can."""
    if device.type != "cuda" and not INTERPRETED:  # first: no package would help
        return "there is no GPU here, and Triton compiles for GPUs"
    return attention.why_no_package("triton")


def resolve_backend(name: str, device: torch.device) -> tuple[str, str]:
    """`auto` -> the quickest backend of the device, and why; an explicit name is used or refused, never replaced.

    Raises:
        RecipeError: the backend that was asked for cannot run here.
    """
    missing = why_no_triton(device)
    if name == "auto":
        if device.type != "cuda":
            return "reference", "plain torch is the quick path of a CPU"
        return ("reference", missing) if missing else ("triton", "fused kernels for the GPU")
    if name not in BACKENDS:
        raise RecipeError(f"model.kernels: '{name}' is unknown; use 'auto' or one of: {', '.join(BACKENDS)}")
    if name == "triton" and missing:
        raise RecipeError(f"model.kernels: triton cannot run: {missing}; or set model.kernels: auto")
    if name == "triton" and device.type != "cuda":
        return name, "interpreted on the CPU, for tests: very slow"
    return name, "as the recipe says"


def resolve_attention(
    name: str, device: torch.device, dtype: torch.dtype, backend: str, *, head_dim: int = 64, dropout: float = 0.0
) -> tuple[str, str]:
    """The same of `model.attn_implementation`, for a backend that `resolve_backend` gave and a model's config."""
    return attention.resolve(name, device, dtype, backend, head_dim=head_dim, dropout=dropout, interpreted=INTERPRETED)
