"""LoRA linears in plain torch; `node.py` has the equations, here are the matmuls that only the adapters need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.lora_linear import Adapter, Base, node
from tuner.kernels.swiglu import reference as swiglu


def _lay_out(adapters: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    scaled = [a * s for a, s in zip(adapters[::2], scalings, strict=True)]
    return torch.cat(scaled).to(dtype), [b.to(dtype) for b in adapters[1::2]]


def _add_to_base(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias).addmm_(z, b.T)


def _through_b(grads: Sequence[Tensor], z: Tensor, b16: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    ranks = [b.shape[1] for b in b16]
    u = torch.cat([g @ b for g, b in zip(grads, b16, strict=True)], dim=1)
    return u, [node.wide(g.T @ own) for g, own in zip(grads, z.split(ranks, dim=1), strict=True)]


def _outer(u: Tensor, x: Tensor) -> Tensor:
    return u.T @ x


def _outer_gated(u: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return u.T @ swiglu.forward(gate, up)


PARTS = node.Parts(
    lay_out=_lay_out,
    add_to_base=_add_to_base,
    through_b=_through_b,
    outer=_outer,
    outer_gated=_outer_gated,
    gate=swiglu.forward,
    gate_backward=swiglu.backward,
)


def lora_linears(x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter]) -> tuple[Tensor, ...]:
    """The outputs `[..., out]` of linears that share the input x `[..., in]`, as one node."""
    return node.LoraLinears.apply(x, PARTS, node.group(bases, adapters), *node.masters(adapters))


def swiglu_lora_linear(gate: Tensor, up: Tensor, base: Base, adapter: Adapter, *, wanted: bool = True) -> Tensor:
    """The linear of h = silu(gate) * up, `[..., I]` -> `[..., out]`.

    One node that keeps gate and up, and makes h again in the backward rather than keeping it too.

    Args:
        wanted: False where only the backward of the result will be asked for, as in a recompute: it is left unwritten.
    """
    return node.SwigluLoraLinear.apply(gate, up, PARTS, node.group([base], [adapter]), wanted, *node.masters([adapter]))
