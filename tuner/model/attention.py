"""The attention of packed rows through the seam that transformers offers; the rule as a dense mask for others.

The plan of a row, and the function that carries it out, travel to every layer as keyword arguments of the model's call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tuner.kernels.attention import Attention
from tuner.kernels.attention import reference as segments
from tuner.types import Batch, Segment

# Not named after "flash" or "sdpa": those strings switch on special cases inside transformers.
NAME = "tuner_varlen"


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
    tuner_attention: Attention = segments.attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over the keys it may see; no dense `[N, N]` mask is ever made.

    Args:
        query: `[1, heads, N, D]`, already rotated; key and value `[1, kv_heads, N, D]` (grouped heads stay grouped).
        tuner_plan: the segments of the row, whose queries tile it in order.
        tuner_attention: what computes it.

    Returns:
        `[1, N, heads, D]`, and None for the weights, as transformers expects.
    """
    if tuner_plan is None:
        raise RuntimeError("tuner_varlen was called without a plan; use Policy.generation_mode() for other calls")
    if torch.is_autocast_enabled(query.device.type):  # rotated in fp32 when the residual stream is
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = tuner_attention(query, key, value, tuner_plan, scaling=scaling, window=sliding_window, dropout=dropout)
    return output, None


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
