"""bitsandbytes, in one place: 4-bit weights -> tensors that matmul, and the optimizers whose state is 8-bit or paged.

On CPUs with avx512_bf16 an evaluation forward of `bnb.nn.Linear4bit` repacks its weight, after which dequantising it
gives another matrix. Nothing of ours runs that forward: `fuse.py` swaps every 4-bit linear for one that dequantises
and multiplies.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from tuner.errors import ModelError, RecipeError, first_line
from tuner.kernels import Kernels
from tuner.kernels.dequantize_nf4.reference import Nested

# The import announces itself on stderr when it finds no GPU; that is no news to a CPU user.
os.environ.setdefault("BNB_CUDA_VERSION", "")
try:
    import bitsandbytes as bnb
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    MISSING = None
except Exception as error:  # of a broken one any; 16-bit training needs none
    bnb, there = None, find_spec("bitsandbytes") is not None
    MISSING = f"installed and cannot be imported ({first_line(error)})" if there else "not installed"
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # transformers and peft take it for absent, too

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


def check_installed(key: str, value: object) -> None:
    """Refuses what needs bitsandbytes where it cannot be used; `key` of the recipe asks for it.

    Raises:
        RecipeError: it cannot be imported.
    """
    if MISSING is not None:
        remedy = "pip install bitsandbytes" if "not installed" in MISSING else "reinstall it, built for this torch"
        raise RecipeError(f"{key}: {value} needs bitsandbytes, which is {MISSING}; {remedy}, or leave {key} out")


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


def _state(module: Any) -> Any:
    """How the weight of a 4-bit linear is packed."""
    assert is_4bit(module)
    state = module.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "a 4-bit weight was repacked by an evaluation forward"
    return state


def dequantize(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` of a 4-bit linear as a plain tensor."""
    return dequantize_4bit(module.weight.data, _state(module)).to(dtype)


def borrow(module: Any, dtype: torch.dtype, functions: Kernels) -> Tensor:
    """The same in a buffer that all 4-bit linears share: good until the next weight is borrowed.

    That is enough for a matmul: those of a model run one after the other, on one stream, and no autograd node keeps the
    weight. Memory that is new at every use costs more than what is written to it: on a CPU its pages are handed out one
    by one, which takes 12 times as long as dequantising a matrix of 4096 x 4096 into old ones.
    """
    state, packed = _state(module), module.weight.data
    out = _workspace(state.shape, dtype, packed.device)
    if functions.backend != "triton":
        return _dequantize_into(out, packed, state)
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return functions.dequantize_nf4(
        packed, state.absmax, state.code,
        blocksize=state.blocksize, shape=tuple(state.shape), dtype=dtype, nested=nested, out=out,
    )  # fmt: skip


_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # a buffer each, as large as the largest weight so far


def _workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    size, key = prod(shape), (device, dtype)
    if key not in _workspaces or _workspaces[key].numel() < size:
        _workspaces.pop(key, None)  # freed before a larger one takes its place
        with torch.inference_mode(False):  # or training could not write to it
            _workspaces[key] = torch.empty(size, dtype=dtype, device=device)
    return _workspaces[key][:size].view(*shape)


_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _dequantize_into(out: Tensor, packed: Tensor, state: Any) -> Tensor:
    """By bitsandbytes, with whose bits ours agree."""
    scale = state.absmax
    if state.nested:
        scale = dequantize_blockwise(scale, state.state2) + state.offset
    settings = state.blocksize, state.quant_type, state.shape, out.dtype
    if packed.device.type == "cuda":
        torch.ops.bitsandbytes.dequantize_4bit.out(packed, scale, *settings, out=out)
    # The operator has no `out` on CPUs; the function behind it has, and gives way to others where it is inexact.
    elif isinstance(lib, ErrorHandlerMockBNBNativeLibrary) or state.blocksize >= 2048 or out.shape[1] % 2:
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit(packed, scale, *settings))
    else:
        function = getattr(lib, f"cdequantize_blockwise_cpu_{state.quant_type}_{_SUFFIX[out.dtype]}")
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (packed, scale, out)]
        function(*addresses, *map(ctypes.c_longlong, (state.blocksize, *out.shape)))
    return out


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuses an optimizer of bitsandbytes where it cannot run."""
    if device.type == "cpu":
        raise RecipeError(f"train.optim: '{name}' needs a GPU; on this CPU use 'adamw_torch'")
    check_installed("train.optim", name)


def optimizer(
    name: str, groups: Iterable[dict[str, Any]], device: torch.device, **settings: Any
) -> torch.optim.Optimizer:
    """`adamw_8bit`, `paged_adamw_8bit` or `paged_adamw_32bit` of bitsandbytes."""
    check_optimizer(name, device)
    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return classes[name](groups, **settings)
