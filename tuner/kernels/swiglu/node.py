"""gate and up -> h: the autograd node that both backends share; keeps its two inputs, makes silu again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class SwiGLU(torch.autograd.Function):
    """`forward_op` and `backward_op` are those of a backend."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, forward_op: Forward, backward_op: Backward) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backward_op = backward_op
        return forward_op(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.backward_op(grads[0], *ctx.saved_tensors), None, None
