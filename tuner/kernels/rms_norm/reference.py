"""Root mean square normalisation in plain torch, one autograd node each (arXiv:1910.07467 eq. 4).

    y = w * x / rms(x),   rms(x) = sqrt(mean(x^2) + eps)

Statistics are in fp32; as in Llama, the normalised x is rounded to the dtype of x before it meets the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuner.kernels.rms_norm.node import AddRMSNorm, RMSNorm


def _wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, 1 / rms in fp32 `[..., 1]`); x itself without a residual."""
    total = x if residual is None else x + residual
    x32 = _wide(total)
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * rstd).to(total.dtype) * weight, total, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_total: Tensor | None, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """(d x with `grad_total` added, in the dtype of x; d weight if it is trained)."""
    g = _wide(grad)
    normed = _wide(x) * rstd  # not in place: in fp32 the wide x is x
    grad_weight = None
    if trained:
        grad_weight = (g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    gw = g * weight
    mean = (gw * normed).mean(-1, keepdim=True)
    grad_x = gw.sub_(normed.mul_(mean)).mul_(rstd)
    return (grad_x if grad_total is None else grad_x.add_(grad_total)).to(x.dtype), grad_weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[..., H]` and the weight `[H]` -> `[..., H]`, in the wider dtype of the two."""
    return RMSNorm.apply(x, weight, eps, _forward, _backward)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): what a layer's second norm reads, and the residual stream that goes on.

    One node: the sum is kept once for both, and the two gradients that reach it are added up inside.
    """
    return AddRMSNorm.apply(x, residual, weight, eps, _forward, _backward)
