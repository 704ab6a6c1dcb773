"""h = silu(gate) * up in plain torch (SwiGLU, arXiv:2002.05202 eq. 6): keeps its two inputs, makes silu again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.swiglu.node import SwiGLU


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """h, outside of autograd."""
    return F.silu(gate).mul_(up)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) from d h."""
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all `[..., I]`."""
    return SwiGLU.apply(gate, up, forward, backward)
