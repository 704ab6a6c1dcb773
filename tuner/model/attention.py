"""The one attention rule, through the seam that transformers offers, and as a dense mask for other implementations.

A query sees a key iff they are of the same document, the key is not later, and the key is in the trunk or in the
query's own branch. The host works the rule out once a batch as a tuple of `Segment`s; it travels to every layer as a
keyword argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tuner.types import Batch, Segment

# Not named after "flash" or "sdpa": those strings switch on special cases inside transformers.
NAME = "tuner_varlen"
PAD = 16  # sizes of short segments are rounded up to a multiple of this
SHORT = 512  # keys of a segment up to which batched matmuls beat torch's fused kernel on CPU in bf16

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

    b segments of P padded queries and L padded keys. A padded query repeats the segment's first one and its result is
    thrown away; a padded key is hidden from every query that counts.
    """

    shape: tuple[int, int, int]  # b, P, L
    queries: Tensor  # [b P] row positions
    keys: Tensor  # [b L] row positions
    hidden: Tensor  # [b, 1, 1, P, L] True where the key is not seen
    real: Tensor  # [b P] True where the query is not padding
    places: Tensor  # where in [b P] the real queries are
    rows: Tensor  # their row positions

    def gather_queries(self, x: Tensor, groups: int) -> Tensor:
        """`[N, heads, D]` -> `[b kv_heads, heads/kv_heads P, D]`."""
        b, p, _ = self.shape
        picked = x.index_select(0, self.queries).view(b, p, groups, -1, x.shape[-1])
        return picked.permute(0, 2, 3, 1, 4).reshape(b * groups, -1, x.shape[-1])

    def gather_keys(self, x: Tensor) -> Tensor:
        """`[N, kv_heads, D]` -> `[b kv_heads, L, D]`."""
        b, _, length = self.shape
        picked = x.index_select(0, self.keys).view(b, length, *x.shape[1:])
        return picked.transpose(1, 2).reshape(-1, length, x.shape[-1])

    def put_queries(self, into: Tensor, x: Tensor) -> None:
        """Writes `[b kv_heads, heads/kv_heads P, D]` to the rows of `into` `[N, heads, D]`, padding left out."""
        b, p, _ = self.shape
        groups, dim = x.shape[0] // b, x.shape[-1]
        flat = x.view(b, groups, -1, p, dim).permute(0, 3, 1, 2, 4).reshape(b * p, -1, dim)
        into.index_copy_(0, self.rows, flat.index_select(0, self.places))

    def add_keys(self, into: Tensor, x: Tensor) -> None:
        """Adds `[b kv_heads, L, D]` to the rows of `into` `[N, kv_heads, D]`: a trunk's keys serve several branches."""
        b, _, length = self.shape
        flat = x.view(b, -1, length, x.shape[-1]).transpose(1, 2).reshape(b * length, -1, x.shape[-1])
        into.index_add_(0, self.keys, flat)


@lru_cache(maxsize=4)  # every layer, forward and backward, asks for the same row
def _buckets(plan: Plan, window: int | None) -> tuple[_Bucket, ...]:
    """The segments of a row by padded size."""
    sizes: dict[tuple[int, int], list[Segment]] = {}
    for segment in plan:
        queries = segment.query[1] - segment.query[0]
        keys = sum(stop - start for start, stop in segment.keys)
        sizes.setdefault((_round_up(queries), _round_up(keys)), []).append(segment)
    return tuple(_bucket(segments, *size, window) for size, segments in sizes.items())


def _round_up(n: int) -> int:
    return -(-n // PAD) * PAD


def _bucket(segments: Sequence[Segment], p: int, length: int, window: int | None) -> _Bucket:
    b = len(segments)
    queries, keys = torch.empty(b, p, dtype=torch.int64), torch.empty(b, length, dtype=torch.int64)
    hidden = torch.ones(b, 1, 1, p, length, dtype=torch.bool)
    real = torch.zeros(b, p, dtype=torch.bool)
    for i, segment in enumerate(segments):
        start, stop = segment.query
        seen = torch.cat([torch.arange(*part) for part in segment.keys])
        n, m = stop - start, len(seen)
        queries[i, :n], queries[i, n:] = torch.arange(start, stop), start
        keys[i, :m], keys[i, m:] = seen, start
        real[i, :n] = True
        hidden[i, 0, 0, :n, :m] = ~segment_mask(n, m, window, queries.device)
        hidden[i, 0, 0, n:, 0] = False  # a padded query sees something, so that its softmax is finite
    places = real.view(-1).nonzero()[:, 0]
    flat = queries.view(-1)
    return _Bucket((b, p, length), flat, keys.view(-1), hidden, real.view(-1), places, flat[places])


class _ShortSegments(torch.autograd.Function):
    """Every segment of a row by plain batched matmuls, for short segments in bf16 on CPU.

    The fused CPU kernel of torch spends three times as long on forward and backward of a document of 170 tokens. Scores
    and softmax are in fp32; probabilities are kept in the dtype of the inputs, as the fused kernel uses them, so memory
    is the sum of queries x keys. Sizes are rounded up to a multiple of PAD: the matmul library compiles and keeps a
    kernel for every size that it meets.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, window: int | None
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
        groups = k.shape[1]
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        with torch.autocast(query.device.type, enabled=False):  # which would take the scores back to bf16
            for bucket in _buckets(plan, window):
                b, p, length = bucket.shape
                scores = torch.bmm(
                    bucket.gather_queries(q, groups).float().mul_(scaling),
                    bucket.gather_keys(k).float().transpose(1, 2),
                )
                scores.view(b, groups, -1, p, length).masked_fill_(bucket.hidden, float("-inf"))
                probabilities = torch.softmax(scores, dim=-1).to(v.dtype)
                bucket.put_queries(output, torch.bmm(probabilities, bucket.gather_keys(v)))
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.buckets, ctx.scaling = _buckets(plan, window), scaling
        return output[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        groups, g = k.shape[1], grads[0][0]
        grad_query = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(k, memory_format=torch.contiguous_format)
        grad_value = torch.zeros_like(v, memory_format=torch.contiguous_format)
        # sum over dP * P of a row of probabilities is dO . O
        delta = (g.float() * output).sum(-1, keepdim=True)  # [N, heads, 1]
        for bucket, p in zip(ctx.buckets, kept, strict=True):
            padding = ~bucket.real
            go = g.index_select(0, bucket.queries).masked_fill_(padding[:, None, None], 0.0)
            b, rows, _ = bucket.shape
            go = go.view(b, rows, groups, -1, g.shape[-1]).permute(0, 2, 3, 1, 4).reshape(b * groups, -1, g.shape[-1])
            grad_scores = torch.bmm(go, bucket.gather_keys(v).transpose(1, 2)).float()
            grad_scores.sub_(bucket.gather_queries(delta, groups)).mul_(p).mul_(ctx.scaling)
            ds = grad_scores.to(q.dtype)
            ds.view(b, groups, -1, rows, ds.shape[-1]).masked_fill_(padding.view(b, 1, 1, rows, 1), 0.0)
            bucket.put_queries(grad_query, torch.bmm(ds, bucket.gather_keys(k)))
            bucket.add_keys(grad_key, torch.bmm(ds.transpose(1, 2), bucket.gather_queries(q, groups)))
            bucket.add_keys(grad_value, torch.bmm(p.transpose(1, 2), go))
        back = (x.transpose(0, 1)[None] for x in (grad_query, grad_key, grad_value))
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


def tuner_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tuner_plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over the keys it may see; no dense `[N, N]` mask is ever made.

    Args:
        query: `[1, heads, N, D]`, already rotated; key and value `[1, kv_heads, N, D]` (grouped heads stay grouped).
        tuner_plan: the segments of the row, whose queries tile it in order.

    Returns:
        `[1, N, heads, D]`, and None for the weights, as transformers expects.
    """
    if tuner_plan is None:
        raise RuntimeError("tuner_varlen was called without a plan; use Policy.generation_mode() for other calls")
    if torch.is_autocast_enabled(query.device.type):  # rotated in fp32 when the residual stream is
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    longest = max(sum(stop - start for start, stop in segment.keys) for segment in tuner_plan)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and longest <= SHORT and not dropout:
        return _ShortSegments.apply(query, key, value, tuner_plan, scaling, sliding_window), None
    return _by_segments(query, key, value, tuner_plan, scaling, dropout, sliding_window), None


def _mask_is_the_plan(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask function that goes with `tuner_varlen`: the plan says it all, so no mask is built."""
    return attention_mask


AttentionInterface.register(NAME, tuner_varlen)
AttentionMaskInterface.register(NAME, _mask_is_the_plan)


def dense_mask(batch: Batch, window: int | None = None) -> Tensor:
    """The attention rule as a `[1, 1, N, N]` boolean mask, for `sdpa` and as the oracle in tests."""
    i = torch.arange(batch.num_tokens, device=batch.input_ids.device)
    same_document = batch.doc_ids[:, None] == batch.doc_ids[None, :]
    visible = (batch.branch_ids[None, :] == 0) | (batch.branch_ids[:, None] == batch.branch_ids[None, :])
    seen = same_document & visible & (i[:, None] >= i[None, :])
    if window is not None:
        seen = seen & (batch.position_ids[:, None] - batch.position_ids[None, :] < window)
    return seen[None, None]
