"""The autograd nodes of LoRA linears, which every backend shares (arXiv:2106.09685 section 4.1).

    y = x W^T + b + z B^T,   z = x (s A)^T
    with g = d y, u = g B:   d x = g W + u (s A),   d A = s u^T x,   d B = g^T z

The A of all linears on one x lie in one matrix, so x is read once for them, and the gradients to x are added up inside
of the matmuls. The backward keeps x and z, reads W again, and gives fp32 gradients of the fp32 masters A and B, which
are cast to the dtype of x once. Dropout of the adapter's input keeps the state of the random numbers, not what they
chose, and draws them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.lora_linear import Adapter, Base


@dataclass(frozen=True)
class Parts:
    """What a backend does by itself: all that is only as wide as the ranks, and the gate. R is the sum of the r."""

    # (A and B of each adapter, s of each, dtype) -> s A [R, in], B [out, r] of each
    lay_out: Callable[[Sequence[Tensor], Sequence[float], torch.dtype], tuple[Tensor, list[Tensor]]]
    # (x [N, in], W [out, in], b [out] or None, z [N, r], B [out, r]) -> y [N, out]
    add_to_base: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    # (g [N, out] of each, z [N, R], B of each) -> u [N, R], g^T z [out, r] of each
    through_b: Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
    # (u [N, R], x [N, in]) -> u^T x [R, in]
    outer: Callable[[Tensor, Tensor], Tensor]
    # (u [N, R], gate [N, I], up [N, I]) -> u^T h [R, I]
    outer_gated: Callable[[Tensor, Tensor, Tensor], Tensor]
    # (gate, up) -> h, and (d h, gate, up) -> d gate, d up
    gate: Callable[[Tensor, Tensor], Tensor]
    gate_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Group:
    """Linears that share one input, without their masters."""

    bases: Sequence[Base]
    scalings: Sequence[float]
    dropouts: Sequence[float]


def group(bases: Sequence[Base], adapters: Sequence[Adapter]) -> Group:
    """What a node needs to know of its linears."""
    return Group(bases, [adapter.scaling for adapter in adapters], [adapter.dropout for adapter in adapters])


def masters(adapters: Sequence[Adapter]) -> list[Tensor]:
    """A and B of each adapter, as the nodes take them."""
    return [master for adapter in adapters for master in (adapter.a, adapter.b)]


@contextmanager
def _drawn_again(state: Tensor, device: torch.device) -> Iterator[None]:
    """Random numbers from `state` on, and after it as if none had been drawn."""
    source: Any = torch.cuda if device.type == "cuda" else torch
    now = source.get_rng_state()
    source.set_rng_state(state)
    try:
        yield
    finally:
        source.set_rng_state(now)


def _dropped(x: Tensor, p: float, state: Tensor) -> Tensor:
    """What the dropout that began at `state` leaves of `x`, scaled up; of a gradient too."""
    with _drawn_again(state, x.device):
        return F.dropout(x, p)


def _through_a(x: Tensor, a16: Tensor, ranks: Sequence[int], group: Group) -> tuple[Tensor, list[Tensor]]:
    """(z [N, R], the state of the random numbers before each adapter's dropout, where there is any)."""
    if not any(group.dropouts):
        return x @ a16.T, []
    source: Any = torch.cuda if x.device.type == "cuda" else torch
    parts, states = [], []
    for a, p in zip(a16.split(ranks), group.dropouts, strict=True):
        states.append(source.get_rng_state())
        parts.append(F.dropout(x, p) @ a.T)
    return torch.cat(parts, dim=1), states


def _forward(
    parts: Parts, x: Tensor, group: Group, adapters: Sequence[Tensor], wanted: bool = True
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x `[N, in]` -> (outputs `[N, out]`, [z, s A, each B], states of the random numbers).

    Not `wanted`, the outputs are left unwritten.
    """
    ranks = [a.shape[0] for a in adapters[::2]]
    a16, b16 = parts.lay_out(adapters, group.scalings, x.dtype)
    z, states = _through_a(x, a16, ranks, group)
    if not wanted:
        return [x.new_empty(x.shape[0], b.shape[0]) for b in b16], [z, a16, *b16], states
    outputs = [
        parts.add_to_base(x, base.weight(x.dtype), base.bias(x.dtype), own, b)
        for base, own, b in zip(group.bases, z.split(ranks, dim=1), b16, strict=True)
    ]
    return outputs, [z, a16, *b16], states


def _grad_x(
    grads: Sequence[Tensor], u: Tensor, a16: Tensor, ranks: Sequence[int], group: Group, states: Sequence[Tensor]
) -> Tensor:
    """g W + u (s A) of all linears, `[N, in]`."""
    if states:
        pairs = zip(u.split(ranks, dim=1), a16.split(ranks), group.dropouts, states, strict=True)
        back = [_dropped(own @ a, p, state) for own, a, p, state in pairs]
        grad_x = back[0]
        for other in back[1:]:
            grad_x = grad_x.add_(other)
    else:
        grad_x = u @ a16
    for g, base in zip(grads, group.bases, strict=True):
        grad_x.addmm_(g, base.weight(g.dtype))
    return grad_x


def _grads_a(
    u: Tensor, x: Callable[[], Tensor], outer: Callable[[Tensor], Tensor], ranks: Sequence[int], group: Group,
    states: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """s u^T x of each adapter in fp32, x being what its dropout leaves of the input; `outer` is u -> u^T x without."""
    if states:
        owns = zip(u.split(ranks, dim=1), group.dropouts, states, strict=True)
        found = [own.T @ _dropped(x(), p, state) for own, p, state in owns]
    else:
        found = list(outer(u).split(ranks))
    return [wide(grad) * s for grad, s in zip(found, group.scalings, strict=True)]


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _interleaved(grads_a: Sequence[Tensor], grads_b: Sequence[Tensor]) -> list[Tensor]:
    return [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]


class LoraLinears(torch.autograd.Function):
    """x and linears on it -> the output of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, group: Group, *adapters: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, kept, ctx.states = _forward(parts, flat, group, adapters)
        ctx.save_for_backward(flat, *kept)
        ctx.parts, ctx.group, ctx.shape = parts, group, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, z, a16, *b16 = ctx.saved_tensors
        parts, group, ranks = ctx.parts, ctx.group, [b.shape[1] for b in b16]
        gs = [g.reshape(flat.shape[0], -1) for g in grads]
        u, grads_b = parts.through_b(gs, z, b16)
        grads_a = _grads_a(u, lambda: flat, lambda u: parts.outer(u, flat), ranks, group, ctx.states)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_x(gs, u, a16, ranks, group, ctx.states).view(ctx.shape)
        return grad_x, None, None, *_interleaved(grads_a, grads_b)


class SwigluLoraLinear(torch.autograd.Function):
    """gate and up -> the linear of h = silu(gate) * up, which is made again in the backward rather than kept too."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, parts: Parts, group: Group, wanted: bool, *adapters: Tensor
    ) -> Tensor:
        h = parts.gate(gate, up)
        (y,), kept, ctx.states = _forward(parts, h.reshape(-1, h.shape[-1]), group, adapters, wanted)
        ctx.save_for_backward(gate, up, *kept)
        ctx.parts, ctx.group = parts, group
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, z, a16, *b16 = ctx.saved_tensors
        parts, group, ranks = ctx.parts, ctx.group, [b.shape[1] for b in b16]
        gs = [grads[0].reshape(z.shape[0], -1)]
        u, grads_b = parts.through_b(gs, z, b16)
        flat = [x.reshape(z.shape[0], -1) for x in (gate, up)]
        grads_a = _grads_a(
            u, lambda: parts.gate(*flat), lambda u: parts.outer_gated(u, *flat), ranks, group, ctx.states
        )
        grad_h = _grad_x(gs, u, a16, ranks, group, ctx.states).view(gate.shape)
        return *parts.gate_backward(grad_h, gate, up), None, None, None, *_interleaved(grads_a, grads_b)
