"""h = silu(gate) * up as one kernel each way (SwiGLU, arXiv:2002.05202 eq. 6), in fp32 inside.

What is stored is read and written once: 3 tensors forward, 5 backward, where eager torch moves 5 and 10.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.portable import rounded
from tuner.kernels.swiglu.node import SwiGLU

# Elements of a program. A thread of the 4 warps then has 2 loads of 16 bytes of each bf16 tensor in flight.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _sigmoid(x, dtype: tl.constexpr):
    """In fp32; for what is stored in `dtype`, where fp32 would show the two units that a quick division is off by."""
    if dtype == tl.float32:
        return tl.div_rn(1.0, 1 + tl.exp(-x))
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, h_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside).to(tl.float32)
    h = gate * _sigmoid(gate, h_ptr.dtype.element_ty) * up
    tl.store(h_ptr + at, rounded(h, h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside).to(tl.float32)
    share = _sigmoid(gate, grad_up_ptr.dtype.element_ty)
    grad_up = grad * gate * share
    grad_gate = grad * up * share * (1 + gate * (1 - share))
    tl.store(grad_gate_ptr + at, rounded(grad_gate, grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, rounded(grad_up, grad_up_ptr.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """h, outside of autograd."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    size = gate.numel()
    _forward_kernel[(triton.cdiv(size, BLOCK),)](gate, up, h, size, BLOCK, num_warps=NUM_WARPS)
    return h


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) from d h; silu is made again."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    grid = (triton.cdiv(size, BLOCK),)
    _backward_kernel[grid](grad, gate, up, grad_gate, grad_up, size, BLOCK, num_warps=NUM_WARPS)
    return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all `[..., I]`."""
    return SwiGLU.apply(gate, up, forward, backward)
