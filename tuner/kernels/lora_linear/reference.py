"""LoRA linears in plain torch: y = x W^T + b + (x (s A)^T) B^T (arXiv:2106.09685 section 4.1).

The A of all linears on one x lie in one matrix, so x is read once for them, and the gradients to x are added up inside
of the matmuls. The backward keeps x and x (s A)^T, reads W again, and gives fp32 gradients of the fp32 masters A and B,
which are cast to the dtype of x once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.lora_linear import Adapter, Base
from tuner.kernels.swiglu import reference as swiglu


def _forward(
    flat: Tensor, bases: Sequence[Base], scalings: Sequence[float], adapters: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """`flat` [N, in] -> (outputs [N, out], x (s A)^T [N, R], s A [R, in], each B [out, r]), R being the sum of r."""
    ranks = [a.shape[0] for a in adapters[::2]]
    a16 = torch.cat([a * s for a, s in zip(adapters[::2], scalings, strict=True)]).to(flat.dtype)
    b16 = [b.to(flat.dtype) for b in adapters[1::2]]
    xa = flat @ a16.T
    outputs = []
    for base, own, b in zip(bases, xa.split(ranks, dim=1), b16, strict=True):
        y = F.linear(flat, base.weight(flat.dtype), base.bias(flat.dtype))
        outputs.append(y.addmm_(own, b.T))
    return outputs, xa, a16, b16


def _backward(
    grads: Sequence[Tensor],
    flat: Tensor,
    xa: Tensor,
    a16: Tensor,
    b16: Sequence[Tensor],
    bases: Sequence[Base],
    scalings: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """(d x [N, in] if it is needed, d A and d B of each adapter in fp32) from the d y [N, out]."""
    ranks = [b.shape[1] for b in b16]
    gb = torch.cat([g @ b for g, b in zip(grads, b16, strict=True)], dim=1)  # [N, R]
    grads_b = [(g.T @ own).float() for g, own in zip(grads, xa.split(ranks, dim=1), strict=True)]
    grads_a = [a * s for a, s in zip((gb.T @ flat).float().split(ranks), scalings, strict=True)]
    grad_x = None
    if needs_x:
        grad_x = gb @ a16
        for g, base in zip(grads, bases, strict=True):
            grad_x.addmm_(g, base.weight(g.dtype))
    return grad_x, [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[Base], scalings: Sequence[float], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, xa, a16, b16 = _forward(flat, bases, scalings, adapters)
        ctx.save_for_backward(flat, xa, a16, *b16)
        ctx.bases, ctx.scalings, ctx.shape = bases, scalings, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, xa, a16, *b16 = ctx.saved_tensors
        gs = [g.reshape(flat.shape[0], -1) for g in grads]
        grad_x, rest = _backward(gs, flat, xa, a16, b16, ctx.bases, ctx.scalings, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *rest


class _SwigluLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, base: Base, scaling: float, a: Tensor, b: Tensor) -> Tensor:
        h = swiglu.forward(gate, up)
        (y,), xa, a16, b16 = _forward(h.reshape(-1, h.shape[-1]), [base], [scaling], [a, b])
        ctx.save_for_backward(gate, up, xa, a16, *b16)
        ctx.base, ctx.scaling = base, scaling
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, xa, a16, *b16 = ctx.saved_tensors
        flat = swiglu.forward(gate, up).reshape(xa.shape[0], -1)
        gs = [grads[0].reshape(xa.shape[0], -1)]
        grad_h, rest = _backward(gs, flat, xa, a16, b16, [ctx.base], [ctx.scaling], True)
        assert grad_h is not None
        return *swiglu.backward(grad_h.view(gate.shape), gate, up), None, None, *rest


def lora_linears(x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter]) -> tuple[Tensor, ...]:
    """The outputs `[..., out]` of linears that share the input x `[..., in]`, as one node."""
    pairs = [master for adapter in adapters for master in (adapter.a, adapter.b)]
    return _LoraLinears.apply(x, bases, [adapter.scaling for adapter in adapters], *pairs)


def swiglu_lora_linear(gate: Tensor, up: Tensor, base: Base, adapter: Adapter) -> Tensor:
    """The linear of h = silu(gate) * up, `[..., I]` -> `[..., out]`.

    One node that keeps gate and up, and makes h again in the backward rather than keeping it too.
    """
    return _SwigluLoraLinear.apply(gate, up, base, adapter.scaling, adapter.a, adapter.b)
