"""Root mean square normalisation in plain torch, one autograd node each (arXiv:1910.07467 eq. 4).

    y = w * x / rms(x),   rms(x) = sqrt(mean(x^2) + eps)

Statistics are in fp32; as in Llama, the normalised x is rounded to the dtype of x before it meets the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms in fp32 `[..., 1]`)."""
    x32 = _wide(x)
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * rstd).to(x.dtype) * weight, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(d x in fp32, d weight if it is needed)."""
    g = _wide(grad)
    normed = _wide(x) * rstd  # not in place: in fp32 the wide x is x
    grad_weight = None
    if needs_weight:
        grad_weight = (g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    gw = g * weight
    mean = (gw * normed).mean(-1, keepdim=True)
    return gw.sub_(normed.mul_(mean)).mul_(rstd), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _backward(grads[0], x, weight, rstd, ctx.needs_input_grad[1])
        return grad_x.to(x.dtype), grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        y, rstd = _forward(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.dtypes = x.dtype, residual.dtype
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grad_total, grad_weight = _backward(grads[0], total, weight, rstd, ctx.needs_input_grad[2])
        grad_total = grad_total.add_(grads[1]).to(total.dtype)
        x, residual = ctx.dtypes
        return grad_total.to(x), grad_total.to(residual), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[..., H]` and the weight `[H]` -> `[..., H]`, in the wider dtype of the two."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): what a layer's second norm reads, and the residual stream that goes on.

    One node: the sum is kept once for both, and the two gradients that reach it are added up inside.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps)
