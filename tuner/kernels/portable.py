"""What Triton kernels share: the same arithmetic under the compiler and under the interpreter.

The interpreter (`TRITON_INTERPRET=1`, in which kernels run on a CPU) keeps bfloat16 as bare 16-bit integers: it
multiplies matrices of them wrongly, and cuts where hardware rounds. The helpers here round to nearest even and widen
before a product, so that an error measured there is an error of the kernel.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(x == x, nearest, bits)  # a NaN stays one
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in fp32; fp32 factors are multiplied as they are, not as TF32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
