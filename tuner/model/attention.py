"""The one attention rule, through the seam that transformers offers, and as a dense mask for other implementations.

A query sees a key iff they are of the same document, the key is not later, and the key is in the trunk or in the
query's own branch. The host works the rule out once a batch as a tuple of `Segment`s; it travels to every layer as a
keyword argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tuner.types import Batch, Segment

# Not named after "flash" or "sdpa": those strings switch on special cases inside transformers.
NAME = "tuner_varlen"
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


class _ShortSegments(torch.autograd.Function):
    """Every segment of a row by plain batched matmuls, for short segments in bf16 on CPU.

    The fused CPU kernel of torch spends three times as long on forward and backward of a document of 170 tokens. Scores
    and softmax are in fp32; probabilities are kept in the dtype of the inputs, as the fused kernel uses them, so memory
    is the sum of queries x keys. One node for the row writes straight into its output and its gradients, without split
    and concatenation.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float, window: int | None
    ) -> Tensor:
        _, heads, n, dim = query.shape
        groups = key.shape[1]
        output = query.new_empty(n, heads, dim)
        kept: list[Tensor] = []
        with torch.autocast(query.device.type, enabled=False):  # which would take the scores back to bf16
            for segment in plan:
                (start, stop), length = segment.query, segment.query[1] - segment.query[0]
                q = query[0, :, start:stop].reshape(groups, -1, dim)  # [kv_heads, heads/kv_heads x queries, D]
                k = _ranges(key, segment.keys)[0]  # [kv_heads, keys, D]
                v = _ranges(value, segment.keys)[0]
                scores = torch.bmm(q.float().mul_(scaling), k.float().transpose(1, 2))
                hidden = ~segment_mask(length, k.shape[1], window, query.device)
                scores.view(groups, -1, length, k.shape[1]).masked_fill_(hidden, float("-inf"))
                p = torch.softmax(scores, dim=-1).to(v.dtype)
                output[start:stop] = torch.bmm(p, v).view(heads, length, dim).transpose(0, 1)
                kept.append(p)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.plan, ctx.scaling = plan, scaling
        return output[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        _, heads, n, dim = query.shape
        groups = key.shape[1]
        grad_query = query.new_empty(n, heads, dim)
        grad_key, grad_value = key.new_zeros(n, groups, dim), value.new_zeros(n, groups, dim)
        # sum over dP * P of a row of probabilities is dO . O
        delta = (grads[0][0].float() * output).sum(-1)  # [N, heads]
        for segment, p in zip(ctx.plan, kept, strict=True):
            (start, stop), length = segment.query, segment.query[1] - segment.query[0]
            q = query[0, :, start:stop].reshape(groups, -1, dim)
            k, v = _ranges(key, segment.keys)[0], _ranges(value, segment.keys)[0]
            g = grads[0][0, start:stop].transpose(0, 1).reshape(groups, -1, dim)
            grad_scores = torch.bmm(g, v.transpose(1, 2)).float()
            grad_scores.sub_(delta[start:stop].T.reshape(groups, -1, 1)).mul_(p).mul_(ctx.scaling)
            ds = grad_scores.to(q.dtype)
            grad_query[start:stop] = torch.bmm(ds, k).view(heads, length, dim).transpose(0, 1)
            _add_ranges(grad_key, segment.keys, torch.bmm(ds.transpose(1, 2), q))
            _add_ranges(grad_value, segment.keys, torch.bmm(p.transpose(1, 2), g))
        shape = (0, 1)
        return (
            grad_query.transpose(*shape)[None],
            grad_key.transpose(*shape)[None],
            grad_value.transpose(*shape)[None],
            None,
            None,
            None,
        )


def _add_ranges(total: Tensor, ranges: Sequence[tuple[int, int]], part: Tensor) -> None:
    """Adds `part` [kv_heads, keys, D] to the rows of `total` [N, kv_heads, D] that its keys came from."""
    done = 0
    for start, stop in ranges:
        total[start:stop] += part[:, done : done + stop - start].transpose(0, 1)
        done += stop - start


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
