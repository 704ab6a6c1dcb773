"""Chunks of scored predictions -> log-probabilities with gradients: the autograd nodes that all backends share.

A backend brings its `Chunks`: how the logits of a chunk are made, and what is read off them. With a frozen head the
gradient to the hidden states, d logp[m] / d hidden[m] = weight[y] - softmax(logits[m]) @ weight, does not depend on
what the loss does with logp; it is made in the forward while the logits are at hand, kept per token, and scaled by the
incoming gradient in the backward. With a trainable head the logits are recomputed in the backward and the weight
gradient accumulates in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor


class Chunks(Protocol):
    """Room for the logits of one chunk after the other."""

    rows: int  # predictions of a chunk

    def score(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        measures: Sequence[str] = (),
        needs_grad: bool = False,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A chunk of m predictions, hidden `[m, H]` in the dtype of the weight `[V, H]`.

        Returns:
            The log-probs and what each of `measures` says, `[1 + measures, m]` float32; and if it is needed
            d logp / d logits = onehot(target) - softmax, times `scale` `[m]`, as `[m, V]` in the dtype of `hidden`.
            The latter lives until the next call.
        """


MakeChunks = Callable[[Tensor, Tensor], Chunks]  # from all of hidden and the weight


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a softmax is computed in: fp32, or float64 for what is float64 already."""
    return torch.promote_types(dtype, torch.float32)


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(i, i + rows) for i in range(0, count, max(1, rows)))


@cache
def _adds_up_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm takes factors in `dtype` and adds their product to fp32 (CUDA, from torch 2.10 on): tries it."""
    if device.type != "cuda":
        return False
    total, factor = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, without rounding the product on its way where the device can."""
    if a.dtype != total.dtype and _adds_up_wide(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _FrozenHead(torch.autograd.Function):
    """The head gets no gradient: d logp / d hidden is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, measures: Sequence[str], make: MakeChunks
    ) -> Tensor:
        chunks, count = make(hidden, weight), hidden.shape[0]
        found = torch.empty(1 + len(measures), count, dtype=wide(hidden.dtype), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _parts(count, chunks.rows):
            found[:, part], grad = chunks.score(
                hidden[part], weight, targets[part], measures=measures, needs_grad=grad_hidden is not None
            )
            if grad_hidden is not None:
                assert grad is not None
                torch.mm(grad, weight, out=grad_hidden[part])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grads[0][0, :, None]).to(grad_hidden.dtype), None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """The head is trained (or tied to trained embeddings): the logits are recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, measures: Sequence[str], make: MakeChunks
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.make = make
        compute = weight.to(hidden.dtype)
        chunks, count = make(hidden, compute), hidden.shape[0]
        found = torch.empty(1 + len(measures), count, dtype=wide(hidden.dtype), device=hidden.device)
        for part in _parts(count, chunks.rows):
            found[:, part], _ = chunks.score(hidden[part], compute, targets[part], measures=measures)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        compute, scale = weight.to(hidden.dtype), grads[0][0]
        chunks = ctx.make(hidden, compute)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device)
        for part in _parts(hidden.shape[0], chunks.rows):
            _, grad = chunks.score(hidden[part], compute, targets[part], needs_grad=True, scale=scale[part])
            torch.mm(grad, compute, out=grad_hidden[part])
            _add_product(grad_weight, grad.T, hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def score(hidden: Tensor, weight: Tensor, targets: Tensor, measures: Sequence[str], make: MakeChunks) -> Tensor:
    """`[1 + measures, M]`: log-probs of the targets, and the measures, which have no gradient."""
    if weight.requires_grad and torch.is_grad_enabled():
        return _TrainableHead.apply(hidden, weight, targets, measures, make)
    return _FrozenHead.apply(hidden, weight.detach().to(hidden.dtype), targets, measures, make)
