"""Hidden states -> per-token log-probabilities, in plain torch, in chunks that stay in the cache.

    logp[m] = logits[m, y] - logsumexp(logits[m, :]),   logits = hidden @ weight^T   (softmax in fp32)

The vocabulary is never laid out for more than a chunk of predictions. With a frozen head the gradient to the hidden states,
d logp[m] / d hidden[m] = weight[y] - softmax(logits[m]) @ weight, does not depend on what the loss does with logp; it is
made in the forward while the logits are in the cache, kept per token, and scaled by the incoming gradient in the backward.
With a trainable head the logits are recomputed in the backward and the weight gradient accumulates in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A chunk of logits in fp32 should stay near the L2/L3 caches on CPU and fill the device on GPU.
CHUNK_BYTES_CPU = 16 * 2**20
CHUNK_BYTES_CUDA = 1024 * 2**20
MIN_CHUNK_ROWS = 32


def chunk_rows(weight: Tensor) -> int:
    """Predictions scored at once, so that their fp32 logits take about CHUNK_BYTES."""
    budget = CHUNK_BYTES_CPU if weight.device.type == "cpu" else CHUNK_BYTES_CUDA
    return max(MIN_CHUNK_ROWS, budget // (4 * weight.shape[0]))


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 `logits` [m, V] -> (logp [m], logsumexp [m, 1])."""
    lse = logits.logsumexp(-1, keepdim=True)
    return logits.gather(1, targets[:, None])[:, 0] - lse[:, 0], lse


def _minus_softmax_plus_onehot(logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """d logp / d logits = onehot(target) - softmax(logits), written over `logits` [m, V]."""
    grad = logits.sub_(lse).exp_().neg_()
    return grad.scatter_add_(1, targets[:, None], torch.ones_like(lse))


class _FrozenHead(torch.autograd.Function):
    """The head gets no gradient: d logp / d hidden is made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = chunk_rows(weight)
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, hidden.shape[0], rows):
            y = targets[i : i + rows]
            logits = (hidden[i : i + rows] @ weight.T).float()
            logps[i : i + rows], lse = _score(logits, y)
            if grad_hidden is not None:
                grad = _minus_softmax_plus_onehot(logits, lse, y)
                torch.mm(grad.to(weight.dtype), weight, out=grad_hidden[i : i + rows])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grads[0][:, None]).to(grad_hidden.dtype), None, None


class _TrainableHead(torch.autograd.Function):
    """The head is trained (or tied to trained embeddings): the logits are recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        rows, compute = chunk_rows(weight), weight.to(hidden.dtype)
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for i in range(0, hidden.shape[0], rows):
            logits = (hidden[i : i + rows] @ compute.T).float()
            logps[i : i + rows], _ = _score(logits, targets[i : i + rows])
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        rows, compute, scale = chunk_rows(weight), weight.to(hidden.dtype), grads[0].float()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for i in range(0, hidden.shape[0], rows):
            h, y = hidden[i : i + rows], targets[i : i + rows]
            logits = (h @ compute.T).float()
            _, lse = _score(logits, y)
            grad = _minus_softmax_plus_onehot(logits, lse, y).mul_(scale[i : i + rows, None]).to(h.dtype)
            torch.mm(grad, compute, out=grad_hidden[i : i + rows])
            grad_weight += grad.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target.

    Args:
        hidden: `[M, H]`, the states that predict, in the compute dtype.
        weight: `[V, H]`, the head; cast to the compute dtype where it is stored wider.
        targets: `[M]` int64.

    Returns:
        `[M]` float32, natural logarithms.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _TrainableHead.apply(hidden, weight, targets)
    return _FrozenHead.apply(hidden, weight.detach().to(hidden.dtype), targets)
