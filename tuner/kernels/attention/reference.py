"""The one attention rule in plain torch: each segment over the keys that it may see.

A query sees a key iff they are of the same document, the key is not later, and the key is in the trunk or in the
query's own branch. The host works the rule out once a batch as a tuple of `Segment`s; no dense `[N, N]` mask is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.types import Segment

SHORT = 1024  # keys of a segment up to which batched matmuls beat torch's fused kernel on CPU in bf16
# Sizes of short segments are rounded up, the longer the coarser: up to this many tokens, to a multiple of that.
PADS = ((64, 16), (256, 32), (SHORT, 64))

Plan = tuple[Segment, ...]


def segment_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bottom-right aligned causal mask `[queries, keys]`, True = seen; `window` counts positions, its own included."""
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _ranges(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Row positions `ranges` of `[1, heads, N, D]`, in order."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Segments of about one size, padded to it, so that one batched matmul serves them all.

    b segments of P padded queries and L padded keys; padding stands for row N, one behind the last, which is zero.
    """

    shape: tuple[int, int, int]  # b, P, L
    queries: Tensor  # [b P] row positions
    keys: Tensor  # [b L] row positions
    mask: Tensor  # [b, P, 1, L] float32; -inf where the key is not seen, else 0
    own: Tensor  # where in [b L] the keys of the queries' own ranges are: each row is in one such range only
    own_rows: Tensor  # their row positions
    shared: tuple[tuple[int, int, int], ...]  # ranges that other segments see too: row positions, place in [b L]

    def pick_queries(self, x: Tensor) -> Tensor:
        """`[kv_heads, N + 1, heads/kv_heads, D]` -> `[kv_heads b, P heads/kv_heads, D]`."""
        b, p, _ = self.shape
        return x.index_select(1, self.queries).view(x.shape[0] * b, p * x.shape[2], x.shape[3])

    def pick_keys(self, x: Tensor) -> Tensor:
        """`[kv_heads, N + 1, 1, D]` -> `[kv_heads b, L, D]`."""
        b, _, length = self.shape
        return x.index_select(1, self.keys).view(x.shape[0] * b, length, x.shape[3])

    def put_queries(self, into: Tensor, x: Tensor) -> None:
        """The way back of `pick_queries`; what comes for the padding lies in row N."""
        b, p, _ = self.shape
        into.index_copy_(1, self.queries, x.view(into.shape[0], b * p, *into.shape[2:]))

    def add_keys(self, into: Tensor, x: Tensor) -> None:
        """Adds the way back of `pick_keys`, without padding: a trunk's keys serve several branches."""
        flat = x.view(into.shape[0], -1, *into.shape[2:])  # [kv_heads, b L, 1, D]
        into.index_add_(1, self.own_rows, flat.index_select(1, self.own))
        for start, stop, place in self.shared:
            into[:, start:stop] += flat[:, place : place + stop - start]


def _num_keys(segment: Segment) -> int:
    return sum(stop - start for start, stop in segment.keys)


@lru_cache(maxsize=4)  # every layer, forward and backward, asks for the same row
def _buckets(plan: Plan, rows: int, window: int | None) -> tuple[_Bucket, ...]:
    """The segments of a row by padded size."""
    sizes: dict[tuple[int, int], list[Segment]] = {}
    for segment in plan:
        queries = segment.query[1] - segment.query[0]
        sizes.setdefault((_round_up(queries), _round_up(_num_keys(segment))), []).append(segment)
    return tuple(_bucket(segments, *size, rows, window) for size, segments in sizes.items())


@lru_cache(maxsize=4)
def _split(plan: Plan, limit: int) -> tuple[Plan, Plan]:
    """The segments of up to `limit` keys, and the others."""
    return tuple(s for s in plan if _num_keys(s) <= limit), tuple(s for s in plan if _num_keys(s) > limit)


def _round_up(n: int) -> int:
    pad = next(pad for limit, pad in PADS if n <= limit)
    return -(-n // pad) * pad


def _bucket(segments: Sequence[Segment], p: int, length: int, rows: int, window: int | None) -> _Bucket:
    b = len(segments)
    queries, keys = torch.full((b, p), rows), torch.full((b, length), rows)
    mask = torch.zeros(b, p, 1, length)  # padded queries see everything, so that their softmax is finite
    own: list[Tensor] = []
    shared: list[tuple[int, int, int]] = []
    for i, segment in enumerate(segments):
        start, stop = segment.query
        n, m = stop - start, _num_keys(segment)
        queries[i, :n] = torch.arange(start, stop)
        keys[i, :m] = torch.cat([torch.arange(*part) for part in segment.keys])
        mask[i, :n, 0].fill_(float("-inf"))
        mask[i, :n, 0, :m].masked_fill_(segment_mask(n, m, window, mask.device), 0.0)
        place = i * length
        for first, last in segment.keys[:-1]:
            shared.append((first, last, place))
            place += last - first
        own.append(torch.arange(place, place + n))
    places = torch.cat(own)
    flat = keys.view(-1)
    return _Bucket((b, p, length), queries.view(-1), flat, mask, places, flat[places], tuple(shared))


def _by_rows(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[1, heads, N, D]` -> `[groups, N + 1, heads/groups, D]` in `dtype`, with zeros in the last row."""
    heads, rows, dim = x.shape[1:]
    laid = torch.empty(groups, rows + 1, heads // groups, dim, dtype=dtype, device=x.device)
    laid[:, :rows].copy_(x[0].unflatten(0, (groups, -1)).transpose(1, 2))
    laid[:, rows:].zero_()
    return laid


class _ShortSegments(torch.autograd.Function):
    """Every segment of a plan by plain batched matmuls, for short segments in bf16 on CPU; other rows get zeros.

    The backward of torch's fused CPU kernel takes several times as long. Scores and softmax are in fp32; probabilities
    are kept in the dtype of the inputs, as the fused kernel uses them, so memory is the sum of queries x keys. Sizes
    are rounded up: the matmul library compiles a kernel for every size that it meets, which takes as long as a few uses
    of it, and keeps some thousand of them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, window: int | None
    ) -> Tensor:
        groups, rows, dtype = key.shape[1], query.shape[2], value.dtype
        q = _by_rows(query, groups, torch.float32).mul_(scaling)
        k, v = _by_rows(key, groups, torch.float32), _by_rows(value, groups, dtype)
        output = torch.zeros(q.shape, dtype=dtype)
        kept: list[Tensor] = []
        buckets = _buckets(plan, rows, window)
        with torch.autocast("cpu", enabled=False):  # which would take the scores back to bf16
            for bucket in buckets:
                b, p, length = bucket.shape
                scores = torch.bmm(bucket.pick_queries(q), bucket.pick_keys(k).transpose(1, 2))
                scores.view(groups, b, p, -1, length).add_(bucket.mask)
                probabilities = torch.softmax(scores, dim=-1, out=scores).to(dtype)
                bucket.put_queries(output, torch.bmm(probabilities, bucket.pick_keys(v)))
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.buckets, ctx.scaling = buckets, scaling
        return output[:, :rows].transpose(0, 1).reshape(1, rows, -1, query.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups, rows, dtype = key.shape[1], query.shape[2], query.dtype
        q, k, v = (_by_rows(x, groups, dtype) for x in (query, key, value))
        g = _by_rows(grads[0].transpose(1, 2), groups, dtype)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for bucket, p in zip(ctx.buckets, kept, strict=True):
            go = bucket.pick_queries(g)
            grad_p = torch.bmm(go, bucket.pick_keys(v).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, dtype)
            bucket.put_queries(grad_q, torch.bmm(grad_scores, bucket.pick_keys(k)))
            bucket.add_keys(grad_k, torch.bmm(grad_scores.transpose(1, 2), bucket.pick_queries(q)))
            bucket.add_keys(grad_v, torch.bmm(p.transpose(1, 2), go))
        grad_q.mul_(ctx.scaling)
        grad_k.mul_(ctx.scaling)
        back = (x[:, :rows].transpose(1, 2).flatten(0, 1)[None] for x in (grad_q, grad_k, grad_v))
        return (*back, None, None, None)


def _by_segments(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Each segment by torch's fused attention; `[1, N, heads, D]`."""
    outputs = []
    for segment in plan:
        (start, stop), keys = segment.query, _ranges(key, segment.keys)
        queries, seen = stop - start, keys.shape[2]
        windowed = window is not None and seen > window
        # is_causal is aligned top-left, so it says what we mean on square blocks only
        square = queries == seen and not windowed
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                keys,
                _ranges(value, segment.keys),
                attn_mask=None if square else segment_mask(queries, seen, window, query.device),
                dropout_p=dropout,
                is_causal=square,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scaling: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over a packed row, softmax(scaling * q k^T) v over the keys that each query sees.

    Args:
        query: `[1, heads, N, D]`, already rotated; key and value `[1, kv_heads, N, D]` (grouped heads stay grouped).
        plan: the segments of the row, whose queries tile it in order.
        window: how many positions back a query sees, its own included; None = all.
        dropout: probability of dropping an attention weight.

    Returns:
        `[1, N, heads, D]`.
    """
    limit = SHORT if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout else 0
    short, long = _split(plan, limit) if limit else ((), plan)
    if not short:
        return _by_segments(query, key, value, plan, scaling, dropout, window)
    output = _ShortSegments.apply(query, key, value, short, scaling, window)
    if long:
        rows = torch.cat([torch.arange(*segment.query) for segment in long])
        output = output.index_copy(1, rows, _by_segments(query, key, value, long, scaling, dropout, window))
    return output
