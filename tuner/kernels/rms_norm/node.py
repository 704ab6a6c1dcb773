"""x -> its norm, or the sum with the residual and its norm: the autograd nodes that both backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (x, residual, weight, eps) -> (y, x + residual, 1 / rms in fp32); without a residual the sum is x itself.
Forward = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor, Tensor]]
# (d y, the sum, weight, 1 / rms, gradient that reaches the sum itself, whether the weight trains)
# -> (d of the sum in its dtype, d weight if it trains)
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


class RMSNorm(torch.autograd.Function):
    """`forward_op` and `backward_op` are those of a backend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, forward_op: Forward, backward_op: Backward) -> Tensor:
        y, _, rstd = forward_op(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backward_op = backward_op
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ctx.backward_op(grads[0], x, weight, rstd, None, ctx.needs_input_grad[1])
        return grad_x, grad_weight, None, None, None


class AddRMSNorm(torch.autograd.Function):
    """The same of a sum, which is kept once for both of its readers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, forward_op: Forward, backward_op: Backward
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = forward_op(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.dtypes, ctx.backward_op = (x.dtype, residual.dtype), backward_op
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grad_total, grad_weight = ctx.backward_op(grads[0], total, weight, rstd, grads[1], ctx.needs_input_grad[2])
        x, residual = ctx.dtypes
        return grad_total.to(x), grad_total.to(residual), grad_weight, None, None, None
