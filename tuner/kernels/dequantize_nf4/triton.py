"""NF4 (or FP4) weights -> plain ones as one kernel, the scales of double quantisation included.

A byte and its scale are read where they are needed, so memory sees half a byte a weight and what is written. Products
and sums are rounded one by one in fp32 as in `reference.py`, and the result once, so the bits are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.dequantize_nf4.reference import Nested
from tuner.kernels.portable import rounded

BLOCK = 2048  # bytes of a program
NUM_WARPS = 4


@triton.jit
def _dequantize_kernel(
    packed_ptr, scale_ptr, code_ptr, nested_code_ptr, nested_scale_ptr, offset_ptr, out_ptr, size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + at, mask=2 * at < size, other=0).to(tl.int32)
    which = 2 * at // BLOCKSIZE  # both weights of a byte are in one block
    scale = tl.load(scale_ptr + which, mask=2 * at < size, other=0)
    if NESTED:
        wide = tl.load(nested_scale_ptr + which // NESTED_BLOCKSIZE, mask=2 * at < size, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * wide + tl.load(offset_ptr)
    first = tl.load(code_ptr + (packed >> 4)) * scale
    second = tl.load(code_ptr + (packed & 15)) * scale
    weights = tl.interleave(first, second)
    to = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + to, rounded(weights, out_ptr.dtype.element_ty), mask=to < size)


def dequantize_nf4(
    packed: Tensor,
    scale: Tensor,
    code: Tensor,
    *,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: Nested | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dequantize_nf4`."""
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    assert out.shape == shape and out.is_contiguous()
    size = shape[0] * shape[1]
    inner = (scale, scale, scale) if nested is None else (nested.code, nested.scale, nested.offset)
    _dequantize_kernel[(triton.cdiv(size, 2 * BLOCK),)](
        packed.contiguous(), scale, code, *inner, out, size,
        BLOCKSIZE=blocksize, NESTED=nested is not None, NESTED_BLOCKSIZE=nested.blocksize if nested else 1,
        BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,  # a fused multiply-add would round otherwise
    )  # fmt: skip
    return out
