"""Hidden states -> per-token log-probabilities: matmuls by the vendor's library, and one kernel between them.

    logp[m] = logits[m, y] - logsumexp(logits[m, :]),   logits = hidden @ weight^T   (softmax in fp32)

A program goes over one row of logits twice: for the maximum and the sums of its softmax, in fp32 and at once
(arXiv:1805.02867 algorithm 3), which give the log-prob and the measures; then, out of the cache, to overwrite it by its
gradient, a factor of the matmuls that follow. No fp32 copy is made. `head.py` says when the gradients are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.portable import rounded
from tuner.kernels.token_logps import head

CHUNK_BYTES = 1024 * 2**20  # of logits in the compute dtype: 4,096 predictions over 128,256 tokens in bf16
ROW_MULTIPLE = 128  # rows of a chunk, as matmuls are tiled
ALIGNMENT = 64  # numbers; rows of logits are filled up to a multiple, as an odd width is slow in every respect
LONGEST = 8192  # numbers of a row that a program reads at once

LOWEST = tl.constexpr(-1e30)  # stands for logits that there are not; finite, so that no difference of two is NaN


@triton.jit
def _kernel(
    logits_ptr, targets_ptr, scale_ptr, found_ptr, found_stride,
    COLLISION: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, GRAD: tl.constexpr, SCALED: tl.constexpr,
    V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * WIDTH
    found_ptr += row
    target = tl.load(targets_ptr + row)
    wanted = tl.load(logits_ptr + target).to(tl.float32)

    # Each lane has columns of its own: its highest x so far, and sums of e = exp(x - highest), e^2 and (x - highest) e.
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < WIDTH, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.where(at < V, x, LOWEST)  # the load is that of the whole width, so that it goes by 16 bytes
        ahead = x - highest
        e = tl.exp(-tl.abs(ahead))  # of the lower one of x and the highest so far, by the higher one
        if ENTROPY:
            moments = tl.where(ahead > 0, e * (moments - ahead * sums), moments + e * ahead)
        if COLLISION:
            squares = tl.where(ahead > 0, e * e * squares + 1, squares + e * e)
        if TOP1:
            beaten |= ((x > wanted) | ((x == wanted) & (at < target))).to(tl.int32)
        sums = tl.where(ahead > 0, e * sums + 1, sums + e)
        highest = tl.maximum(highest, x)

    top = tl.max(highest, 0)
    behind = highest - top
    e = tl.exp(behind)
    total = tl.sum(e * sums, 0)
    tl.store(found_ptr, wanted - top - tl.log(total))
    if COLLISION:
        tl.store(found_ptr + COLLISION * found_stride, tl.log(tl.sum(e * e * squares, 0)) - 2 * tl.log(total))
    if ENTROPY:
        moment = tl.sum(e * (moments + behind * sums), 0)
        tl.store(found_ptr + ENTROPY * found_stride, tl.log(total) - moment / total)
    if TOP1:
        tl.store(found_ptr + TOP1 * found_stride, 1.0 - tl.max(beaten, 0).to(tl.float32))

    if GRAD:
        scale = tl.load(scale_ptr + row).to(tl.float32) if SCALED else 1.0
        share = tl.div_rn(1.0, total)
        for start in range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < WIDTH, other=0.0, eviction_policy="evict_first").to(tl.float32)
            x = tl.where(at < V, x, LOWEST)
            grad = (tl.where(at == target, 1.0, 0.0) - tl.exp(x - top) * share) * scale
            tl.store(logits_ptr + at, rounded(grad, logits_ptr.dtype.element_ty), mask=at < WIDTH)


def chunk_rows(weight: Tensor) -> int:
    """Predictions scored at once: thousands, so that the matmuls run at full rate."""
    return max(1, CHUNK_BYTES // (weight.element_size() * weight.shape[0]) // ROW_MULTIPLE) * ROW_MULTIPLE


class _Chunks:
    """Room for one chunk of logits in the compute dtype; the gradient takes their place."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        vocabulary = weight.shape[0]
        self.rows = min(chunk_rows(weight), hidden.shape[0])
        width = -(-vocabulary // ALIGNMENT) * ALIGNMENT
        self._logits = torch.empty(self.rows, width, dtype=hidden.dtype, device=hidden.device)

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
        m, vocabulary, width = hidden.shape[0], weight.shape[0], self._logits.shape[1]
        logits = torch.mm(hidden, weight.T, out=self._logits[:m, :vocabulary])
        found = torch.empty(1 + len(measures), m, dtype=torch.float32, device=hidden.device)
        rows = {name: row for row, name in enumerate(measures, 1)}
        block = min(triton.next_power_of_2(width), LONGEST)
        _kernel[(m,)](
            logits, targets.contiguous(), found if scale is None else scale.contiguous(), found, m,
            *(rows.get(name, 0) for name in ("collision", "entropy", "top1")),
            needs_grad, scale is not None, vocabulary, width, block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
        return found, logits if needs_grad else None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, measures: Sequence[str] = ()) -> Tensor:
    """Log-probability of each target; takes and gives what `reference.token_logps` does."""
    found = head.score(hidden, weight, targets, measures, _Chunks)
    return found if measures else found.squeeze(0)
