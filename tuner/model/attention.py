"""The one attention rule, through the seam that transformers offers, and as a dense mask for other implementations.

A query sees a key iff they are of the same document, the key is not later, and the key is in the trunk or in the query's own
branch. The host works the rule out once a batch as a tuple of `Segment`s; it travels to every layer as a keyword argument.
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


def segment_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bottom-right aligned causal mask `[queries, keys]`, True = seen; `window` counts positions, the own one included."""
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _ranges(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Row positions `ranges` of `[1, heads, N, D]`, in order."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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
    tuner_plan: tuple[Segment, ...] | None = None,
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
    outputs = []
    for segment in tuner_plan:
        (start, stop), keys = segment.query, _ranges(key, segment.keys)
        queries, seen = stop - start, keys.shape[2]
        windowed = sliding_window is not None and seen > sliding_window
        # is_causal is aligned top-left, so it says what we mean on square blocks only
        square = queries == seen and not windowed
        mask = None if square else segment_mask(queries, seen, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                keys,
                _ranges(value, segment.keys),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=square,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2), None


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
