"""h = silu(gate) * up in plain torch (SwiGLU, arXiv:2002.05202 eq. 6): keeps its two inputs, makes silu again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """h, outside of autograd."""
    return F.silu(gate).mul_(up)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) from d h."""
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return backward(grads[0], *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all `[..., I]`."""
    return _SwiGLU.apply(gate, up)
