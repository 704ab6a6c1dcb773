"""Attention over packed rows with shared prefixes: the implementations that there are, and which of them runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from tuner.errors import RecipeError

Attention = Callable[..., Tensor]  # takes and gives what `reference.attention` does

REFERENCE = "tuner_varlen"
# Name in a recipe -> (module, function).
IMPLEMENTATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        REFERENCE: ("reference", "attention"),
        "triton": ("triton", "attention"),
        "varlen": ("varlen", "torch_varlen"),
        "flash_attention_2": ("varlen", "flash_attention_2"),
        "flash_attention_3": ("varlen", "flash_attention_3"),
    }
)
PACKAGES = {"triton": "triton", "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@cache
def load(name: str) -> Attention:
    """The function of an implementation that `resolve` gave."""
    module, function = IMPLEMENTATIONS[name]
    loaded: Attention = getattr(import_module(f"{__name__}.{module}"), function)
    return loaded


def why_not(name: str, device: torch.device, dtype: torch.dtype, interpreted: bool = False) -> str | None:
    """Why an implementation cannot run here, as part of a sentence; None where it can."""
    if name == REFERENCE:
        return None
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        remedy = "pip install 'tuner[kernels]'" if package == "triton" else "install it, built for this torch"
        return f"the package {package} is not installed; {remedy}"
    if device.type != "cuda" and not (interpreted and name == "triton"):
        return "there is no GPU here, and it runs on NVIDIA GPUs only"
    if name != "triton" and dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, and this run in {str(dtype).removeprefix('torch.')}"
    if name == "varlen" and find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    return None


def resolve(
    name: str, device: torch.device, dtype: torch.dtype, backend: str, interpreted: bool = False
) -> tuple[str, str]:
    """`auto` -> the implementation that goes with the device and the backend, and why; an explicit name is checked.

    On a GPU that is the Triton kernel: like torch's and FlashAttention's it skips what is masked, and besides it reads
    a shared trunk where it lies and gives the same bytes every time.

    Raises:
        RecipeError: the implementation that was asked for cannot run here.
    """
    if name == "auto":
        if backend == "triton":
            return "triton", "packed rows, shared prefixes and the same bytes every time on a GPU"
        return REFERENCE, "each segment by itself, in plain torch"
    if name in IMPLEMENTATIONS and (missing := why_not(name, device, dtype, interpreted)):
        raise RecipeError(
            f"model.attn_implementation: {name} cannot run: {missing}; set model.attn_implementation: auto"
        )
    return name, "as the recipe says"
