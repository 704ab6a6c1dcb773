"""Rotation of queries and keys by the angles of their positions, in plain torch (RoPE, arXiv:2104.09864 eq. 34).

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),   x1, x2 the two halves of a head, as Llama lays them out

The tables hold whatever scaling of frequencies the model has (Llama 3's among them). The backward turns the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = q.shape[-1] // 2
        ctx.save_for_backward(cos, sin)
        cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None, :half], -sin[:, :, None, :half]
        return *(_rotated(grad, cos, sin) for grad in grads), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (left, right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q `[1, N, heads, D]` and k `[1, N, kv_heads, D]`, rotated.

    Args:
        cos, sin: `[1, N, D]`, equal in both halves of D; in fp32 or in the dtype of q and k.
    """
    return _Rope.apply(q, k, cos, sin)
