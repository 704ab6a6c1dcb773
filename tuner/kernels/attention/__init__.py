"""Attention over packed rows with shared prefixes: the implementations that there are, and which of them runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from tuner.errors import RecipeError, first_line

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
MAX_HEAD_DIM: Mapping[str, int] = MappingProxyType(
    {"triton": 128, "varlen": 256, "flash_attention_2": 256, "flash_attention_3": 256}
)
PACKAGES = {"triton": "triton", "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@cache
def load(name: str) -> Attention:
    """The function of an implementation that `resolve` gave."""
    module, function = IMPLEMENTATIONS[name]
    loaded: Attention = getattr(import_module(f"{__name__}.{module}"), function)
    return loaded


def why_no_package(package: str) -> str | None:
    """Why a package cannot be imported, as part of a sentence; None where it can.

    One that was built for another torch, or that misses a library, is installed and yet fails when it is imported.
    """
    remedy = "pip install 'tuner[kernels]'" if package == "triton" else "install it, built for this torch"
    if find_spec(package) is None:
        return f"the package {package} is not installed; {remedy}"
    try:
        import_module(package)
    except Exception as error:  # whatever a broken one raises
        return f"the package {package} is installed and cannot be imported ({first_line(error)}); {remedy}"
    return None


def why_not(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    dropout: float = 0.0,
    interpreted: bool = False,
) -> str | None:
    """Why an implementation cannot run here, as part of a sentence; None where it can.

    Args:
        head_dim: of the model.
        dropout: of attention weights, which the model will train with.
        interpreted: whether Triton runs its kernels on CPUs.
    """
    if name == REFERENCE:
        return None
    if device.type != "cuda" and not (interpreted and name == "triton"):  # first: no package would help
        return "there is no GPU here, and it runs on NVIDIA GPUs only"
    if name in PACKAGES and (lacking := why_no_package(PACKAGES[name])):
        return lacking
    if name != "triton" and dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, and this run in {str(dtype).removeprefix('torch.')}"
    if name == "varlen" and find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    if head_dim > MAX_HEAD_DIM[name]:
        return f"its heads have up to {MAX_HEAD_DIM[name]} dimensions, and those of this model {head_dim}"
    if dropout:
        return f"it has no dropout of attention weights, and the model's config.json sets attention_dropout: {dropout}"
    return None


def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    *,
    head_dim: int = 64,
    dropout: float = 0.0,
    interpreted: bool = False,
) -> tuple[str, str]:
    """`auto` -> the implementation that goes with device, backend and model, and why; an explicit name is checked.

    On a GPU that is the Triton kernel: like torch's and FlashAttention's it skips what is masked, and besides it reads
    a shared trunk where it lies and gives the same bytes every time.

    Raises:
        RecipeError: the implementation that was asked for cannot run here.
    """
    asked = "triton" if name == "auto" and backend == "triton" else name
    missing = None
    if asked in IMPLEMENTATIONS:
        missing = why_not(asked, device, dtype, head_dim=head_dim, dropout=dropout, interpreted=interpreted)
    if name == "auto":
        if asked == "triton" and missing is None:
            return "triton", "packed rows, shared prefixes and the same bytes every time on a GPU"
        if device.type == "cuda" and why_no_package("triton"):
            if why_not("varlen", device, dtype, head_dim=head_dim, dropout=dropout) is None:
                return "varlen", "torch's kernel over sequences, as the package triton cannot be used"
        why = f"; the Triton kernel cannot run: {missing}" if missing else ""
        return REFERENCE, f"each segment by itself, in plain torch{why}"
    if missing:
        raise RecipeError(
            f"model.attn_implementation: {name} cannot run: {missing}; or set model.attn_implementation: auto"
        )
    return name, "as the recipe says"
