"""Hidden states -> per-token log-probabilities, in plain torch, in chunks that stay in the cache.

    logp[m] = logits[m, y] - logsumexp(logits[m, :]),   logits = hidden @ weight^T   (softmax in fp32)

The vocabulary is never laid out for more than a chunk of predictions. With a frozen head the gradient to the hidden
states, d logp[m] / d hidden[m] = weight[y] - softmax(logits[m]) @ weight, does not depend on what the loss does with
logp; it is made in the forward while the logits are in the cache, kept per token, and scaled by the incoming gradient
in the backward. With a trainable head the logits are recomputed in the backward and the weight gradient accumulates
in fp32.

Where it is asked for, the same pass also gives log Σ_v p(v)² of every prediction, p being its softmax: the logarithm of
the probability that two samples of the next token agree. It has no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A chunk of logits in fp32 should stay near the L2/L3 caches on CPU and fill the device on GPU.
CHUNK_BYTES_CPU = 16 * 2**20
CHUNK_BYTES_CUDA = 1024 * 2**20
ROW_MULTIPLE = 64  # on CPU the matmul library compiles and keeps a kernel for every size that it meets


def chunk_rows(weight: Tensor) -> int:
    """Predictions scored at once, so that their fp32 logits take about CHUNK_BYTES."""
    budget = CHUNK_BYTES_CPU if weight.device.type == "cpu" else CHUNK_BYTES_CUDA
    return max(1, budget // (4 * weight.shape[0]) // ROW_MULTIPLE) * ROW_MULTIPLE


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`logits` [m, V] -> (softmax in fp32, written to `out`; logsumexp [m]).

    One pass makes the softmax. The largest logit has the largest probability, exp(max - lse), so
    lse = max - log(largest probability) without a second pass of exponentials, and without overflow.
    """
    if logits.device.type == "cpu" and logits.dtype != torch.float32:
        probabilities = torch.softmax(out.copy_(logits), dim=-1, out=out)  # with `dtype` the copy is a new one
    else:
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32, out=out)
    return probabilities, logits.amax(-1).float() - probabilities.amax(-1).log()


@lru_cache(maxsize=1)
def _cpu_room(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept from call to call, as it would come in fresh pages every time."""
    return torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, vocabulary)


class _Buffers:
    """Room for one chunk of logits, reused by every chunk: fresh pages cost more than the arithmetic on them."""

    def __init__(self, rows: int, hidden: Tensor, weight: Tensor) -> None:
        self.rows = min(rows, hidden.shape[0])
        if hidden.device.type == "cpu":
            self._logits, self._fp32 = _cpu_room(rows, weight.shape[0], hidden.dtype)
        else:
            shape = (self.rows, weight.shape[0])
            self._logits = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
            self._fp32 = torch.empty(shape, dtype=torch.float32, device=hidden.device)

    def score(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(logp of each target [m], softmax [m, V] in fp32; the latter lives until the next call)."""
        m = hidden.shape[0]
        logits = torch.mm(hidden, weight.T, out=self._logits[:m])
        probabilities, lse = _softmax(logits, self._fp32[:m])
        return logits.gather(1, targets[:, None])[:, 0].float() - lse, probabilities

    def grad_logits(self, probabilities: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        """d logp / d logits = onehot(target) - softmax, times `scale` [m], in the compute dtype; ends `score`'s result.

        The difference is taken in fp32: for a confident prediction it is much smaller than its two parts.
        """
        grad = probabilities.neg_()
        grad.scatter_add_(1, targets[:, None], torch.ones_like(targets, dtype=torch.float32)[:, None])
        if scale is not None:
            grad.mul_(scale[:, None])
        return grad if grad.dtype == self._logits.dtype else self._logits[: grad.shape[0]].copy_(grad)


def _results(ctx: Any, hidden: Tensor, collision: bool) -> tuple[Tensor, Tensor | None]:
    """Room for the log-probs, and for the collisions if they are asked for: `[M]` float32 each."""
    logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    if not collision:
        return logps, None
    collisions = torch.empty_like(logps)
    ctx.mark_non_differentiable(collisions)
    return logps, collisions


def _log_collision(probabilities: Tensor) -> Tensor:
    """log Σ_v p(v)² of each row of `[m, V]`. The sum is 1/V at least, so what underflows in it does not count."""
    return 2 * torch.linalg.vector_norm(probabilities, dim=-1).log()


class _FrozenHead(torch.autograd.Function):
    """The head gets no gradient: d logp / d hidden is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, collision: bool
    ) -> tuple[Tensor, Tensor | None]:
        buffers = _Buffers(chunk_rows(weight), hidden, weight)
        logps, collisions = _results(ctx, hidden, collision)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, hidden.shape[0], max(1, buffers.rows)):
            part = slice(i, i + buffers.rows)
            logps[part], probabilities = buffers.score(hidden[part], weight, targets[part])
            if collisions is not None:
                collisions[part] = _log_collision(probabilities)
            if grad_hidden is not None:
                torch.mm(buffers.grad_logits(probabilities, targets[part]), weight, out=grad_hidden[part])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return logps, collisions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grads[0][:, None]).to(grad_hidden.dtype), None, None, None


class _TrainableHead(torch.autograd.Function):
    """The head is trained (or tied to trained embeddings): the logits are recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, collision: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, targets)
        compute = weight.to(hidden.dtype)
        buffers = _Buffers(chunk_rows(weight), hidden, compute)
        logps, collisions = _results(ctx, hidden, collision)
        for i in range(0, hidden.shape[0], max(1, buffers.rows)):
            part = slice(i, i + buffers.rows)
            logps[part], probabilities = buffers.score(hidden[part], compute, targets[part])
            if collisions is not None:
                collisions[part] = _log_collision(probabilities)
        return logps, collisions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        compute, scale = weight.to(hidden.dtype), grads[0].float()
        buffers = _Buffers(chunk_rows(weight), hidden, compute)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for i in range(0, hidden.shape[0], max(1, buffers.rows)):
            part = slice(i, i + buffers.rows)
            _, probabilities = buffers.score(hidden[part], compute, targets[part])
            grad = buffers.grad_logits(probabilities, targets[part], scale[part])
            torch.mm(grad, compute, out=grad_hidden[part])
            grad_weight += grad.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, collision: bool = False) -> Tensor:
    """Log-probability of each target.

    Args:
        hidden: `[M, H]`, the states that predict, in the compute dtype.
        weight: `[V, H]`, the head; cast to the compute dtype where it is stored wider.
        targets: `[M]` int64.
        collision: whether log Σ_v p(v)² of each prediction is wanted too.

    Returns:
        `[M]` float32, natural logarithms; with `collision` `[2, M]`, of which the second row has no gradient.
    """
    count = hidden.shape[0]
    if hidden.device.type == "cpu" and (filler := -count % ROW_MULTIPLE):
        hidden, targets = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler))
    if weight.requires_grad and torch.is_grad_enabled():
        logps, collisions = _TrainableHead.apply(hidden, weight, targets, collision)
    else:
        logps, collisions = _FrozenHead.apply(hidden, weight.detach().to(hidden.dtype), targets, collision)
    return logps[:count] if collisions is None else torch.stack([logps[:count], collisions[:count]])
