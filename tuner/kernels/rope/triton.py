"""Rotation of queries and keys in one launch (RoPE, arXiv:2104.09864 eq. 34); the backward turns the other way.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),   x1, x2 the two halves of a head, as Llama lays them out

A program rotates all heads of one token, so the tables are read once a token. Views are read where they lie, by their
strides. The result is new memory: nothing of the input is kept for the backward, so a caller that lets go of q and k
holds as much as if they were overwritten, and one that does not may still read them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.portable import rounded


@triton.jit
def _rotate(
    x_ptr, out_ptr, cos, sin, token_stride, head_stride, stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (at < HALF)
    x_ptr += token * token_stride + head * head_stride
    first = tl.load(x_ptr + at * stride, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + (at + HALF) * stride, mask=inside, other=0.0).to(tl.float32)
    out_ptr += (token * HEADS + head) * (2 * HALF) + at
    dtype: tl.constexpr = out_ptr.dtype.scalar.element_ty
    tl.store(out_ptr, rounded(first * cos - second * sin, dtype), mask=inside)
    tl.store(out_ptr + HALF, rounded(second * cos + first * sin, dtype), mask=inside)


@triton.jit
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_token, q_head, q_stride, k_token, k_head, k_stride, cos_token, sin_token,
    SIGN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, KV_HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_ptr + token * cos_token + at, mask=at < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_token + at, mask=at < HALF, other=0.0).to(tl.float32) * SIGN
    _rotate(q_ptr, q_out_ptr, cos, sin, q_token, q_head, q_stride, HEADS, HALF, HEAD_BLOCK, HALF_BLOCK)
    _rotate(k_ptr, k_out_ptr, cos, sin, k_token, k_head, k_stride, KV_HEADS, HALF, KV_HEAD_BLOCK, HALF_BLOCK)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """q and k turned by `sign` times their angles."""
    _, tokens, heads, dim = q.shape
    kv_heads, half = k.shape[2], dim // 2
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    blocks = [triton.next_power_of_2(n) for n in (heads, kv_heads, half)]
    cos, sin = (table if table.stride(2) == 1 else table.contiguous() for table in (cos, sin))
    _kernel[(tokens,)](
        q, k, cos, sin, *outs, *q.stride()[1:], *k.stride()[1:], cos.stride(1), sin.stride(1),
        sign, heads, kv_heads, half, *blocks,
        num_warps=min(16, max(1, max(blocks[:2]) * blocks[2] // 512)),  # 2 loads of 16 bytes a thread of each half
    )  # fmt: skip
    return outs[0], outs[1]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotated(grads[0], grads[1], cos, sin, -1), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q `[1, N, heads, D]` and k `[1, N, kv_heads, D]`, rotated.

    Args:
        cos, sin: `[1, N, D]`, equal in both halves of D; in fp32 or in the dtype of q and k.
    """
    return _Rope.apply(q, k, cos, sin)
