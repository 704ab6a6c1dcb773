"""bitsandbytes, in one place: 4-bit weights -> tensors that matmul, and the optimizers whose state is 8-bit or paged.

On CPUs with avx512_bf16 an evaluation forward of `bnb.nn.Linear4bit` repacks its weight, after which dequantising it
gives another matrix. Nothing of ours runs that forward: `fuse.py` swaps every 4-bit linear for one that dequantises
and multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from tuner.errors import ModelError, RecipeError

# The import announces itself on stderr when it finds no GPU; that is no news to a CPU user.
os.environ.setdefault("BNB_CUDA_VERSION", "")
try:
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
except ImportError:  # 16-bit training does not need it
    bnb = None

Linear4bit: Any = None if bnb is None else bnb.nn.Linear4bit

BLOCK = 64  # weights that share one scale


def quantization_config(quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `from_pretrained` quantises the linears: blocks of 64, the head left as it is (QLoRA, arXiv:2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_shapes(hidden_size: int, intermediate_size: int) -> None:
    """Refuses widths that 4-bit blocks do not divide, before bitsandbytes fails on them with a traceback."""
    for name, width in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if width % BLOCK:
            raise ModelError(
                f"model.load_in_4bit: this checkpoint's {name} is {width}, and 4-bit blocks need a multiple of "
                f"{BLOCK}; set model.load_in_4bit: false"
            )


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear of bitsandbytes."""
    return Linear4bit is not None and isinstance(module, Linear4bit)


def dequantize(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` of a 4-bit linear as a plain tensor."""
    assert is_4bit(module)
    state = module.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "a 4-bit weight was repacked by an evaluation forward"
    return dequantize_4bit(module.weight.data, state).to(dtype)


def optimizer(
    name: str, groups: Iterable[dict[str, Any]], device: torch.device, **settings: Any
) -> torch.optim.Optimizer:
    """`adamw_8bit`, `paged_adamw_8bit` or `paged_adamw_32bit` of bitsandbytes."""
    if device.type == "cpu":
        raise RecipeError(f"train.optim: '{name}' needs a GPU; on this CPU use 'adamw_torch'")
    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return classes[name](groups, **settings)
