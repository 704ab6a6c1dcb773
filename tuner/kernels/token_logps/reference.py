"""Hidden states -> per-token log-probabilities, in plain torch, in chunks that stay in the cache.

    logp[m] = logits[m, y] - logsumexp(logits[m, :]),   logits = hidden @ weight^T   (softmax in fp32)

The vocabulary is never laid out for more than a chunk of predictions. `head.py` says when the gradients are made.

Where they are asked for, the same pass also gives measures of every prediction, p being its softmax. They have no
gradient.

    collision   log Σ_v p(v)²: the logarithm of the probability that two samples of the next token agree
    entropy     -Σ_v p(v) log p(v), in nats
    top1        1 where the target is the most likely token, which greedy decoding would say (the first, if several are)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.token_logps import head

# A chunk of logits in fp32 should stay near the L2/L3 caches on CPU and fill the device on GPU.
CHUNK_BYTES_CPU = 32 * 2**20
CHUNK_ROWS_CPU = 256  # and no fewer: what a matmul over a wide vocabulary gains by more rows outweighs its cache misses
CHUNK_BYTES_CUDA = 1024 * 2**20
ROW_MULTIPLE = 64  # on CPU the matmul library compiles and keeps a kernel for every size that it meets


def rows_at_once(vocabulary: int, kind: str) -> int:
    """Predictions scored at once on a `kind` of device, so that their fp32 logits take about CHUNK_BYTES."""
    budget, least = (CHUNK_BYTES_CPU, CHUNK_ROWS_CPU) if kind == "cpu" else (CHUNK_BYTES_CUDA, ROW_MULTIPLE)
    return max(budget // (4 * vocabulary) // ROW_MULTIPLE * ROW_MULTIPLE, least)


def chunk_rows(weight: Tensor) -> int:
    """The same for a head `[V, H]`."""
    return rows_at_once(weight.shape[0], weight.device.type)


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`logits` [m, V] -> (softmax in fp32, written to `out`; logsumexp [m]).

    One pass makes the softmax. The largest logit has the largest probability, exp(max - lse), so
    lse = max - log(largest probability) without a second pass of exponentials, and without overflow.
    """
    if logits.device.type == "cpu" and logits.dtype != out.dtype:
        probabilities = torch.softmax(out.copy_(logits), dim=-1, out=out)  # with `dtype` the copy is a new one
    else:
        probabilities = torch.softmax(logits, dim=-1, dtype=out.dtype, out=out)
    return probabilities, logits.amax(-1).to(out.dtype) - probabilities.amax(-1).log()


def _log_collision(probabilities: Tensor, logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """The sum is 1/V at least, so what underflows in it does not count."""
    return 2 * torch.linalg.vector_norm(probabilities, dim=-1).log()


def _entropy(probabilities: Tensor, logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """lse - Σ p x, which takes no logarithm of each probability, and differs from Σ p log p by rounding alone."""
    return (lse - torch.linalg.vecdot(probabilities, logits.to(lse.dtype))).clamp_(min=0)


def _is_top1(probabilities: Tensor, logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """By the logits, as different ones may round to one probability; on CPU argmax is slow where they are narrow."""
    return (logits.to(lse.dtype).argmax(-1) == targets).to(lse.dtype)


# Name -> its values `[m]` from probabilities and logits `[m, V]`, and logsumexps and targets `[m]`.
MEASURES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"collision": _log_collision, "entropy": _entropy, "top1": _is_top1}
)


@lru_cache(maxsize=1)
def _cpu_room(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept from call to call, as it would come in fresh pages every time."""
    return torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, vocabulary, dtype=head.wide(dtype))


class _Chunks:
    """Room for one chunk of logits, reused by every chunk: fresh pages cost more than the arithmetic on them."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        rows = chunk_rows(weight)
        self.rows = min(rows, hidden.shape[0])
        if hidden.device.type == "cpu":
            self._logits, self._wide = _cpu_room(rows, weight.shape[0], hidden.dtype)
        else:
            shape = (self.rows, weight.shape[0])
            self._logits = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
            self._wide = torch.empty(shape, dtype=head.wide(hidden.dtype), device=hidden.device)

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
        """As `head.Chunks` says."""
        m = hidden.shape[0]
        logits = torch.mm(hidden, weight.T, out=self._logits[:m])
        probabilities, lse = _softmax(logits, self._wide[:m])
        logps = logits.gather(1, targets[:, None])[:, 0].to(lse.dtype) - lse
        found = torch.stack([logps, *(MEASURES[name](probabilities, logits, lse, targets) for name in measures)])
        return found, self._grad_logits(probabilities, targets, scale) if needs_grad else None

    def _grad_logits(self, probabilities: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
        """The difference is taken in fp32: for a confident prediction it is much smaller than its two parts."""
        grad = probabilities.neg_()
        grad.scatter_add_(1, targets[:, None], torch.ones_like(targets, dtype=grad.dtype)[:, None])
        if scale is not None:
            grad.mul_(scale[:, None])
        return grad if grad.dtype == self._logits.dtype else self._logits[: grad.shape[0]].copy_(grad)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, measures: Sequence[str] = ()) -> Tensor:
    """Log-probability of each target.

    Args:
        hidden: `[M, H]`, the states that predict, in the compute dtype.
        weight: `[V, H]`, the head; cast to the compute dtype where it is stored wider.
        targets: `[M]` int64.
        measures: what else is wanted of each prediction, by the names of `MEASURES`.

    Returns:
        `[M]` float32, natural logarithms; with measures `[1 + measures, M]`, where only the first row has a gradient.
    """
    count = hidden.shape[0]
    if hidden.device.type == "cpu" and (filler := -count % ROW_MULTIPLE):
        hidden, targets = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler))
    found = head.score(hidden, weight, targets, measures, _Chunks)[:, :count]
    return found if measures else found.squeeze(0)
