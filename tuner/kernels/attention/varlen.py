"""The same rule by kernels over sequences of different lengths: torch's `varlen_attn`, FlashAttention 2 and 3.

Such a kernel takes queries and keys as two lists of sequences, and aligns causal masks at the end of each sequence.
So a segment is one sequence of its queries over its keys in order, the trunk first: a branch sees all of its trunk and
its own past, exactly. A trunk's keys and values are copied once for each of its branches; the backward adds the copies
up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from tuner.kernels.attention.reference import Plan


@dataclass(frozen=True, eq=False)
class Sequences:
    """A plan as kernels over sequences take it."""

    cu_queries: Tensor  # [segments + 1] int32, where the queries of each segment begin
    cu_keys: Tensor  # [segments + 1] int32
    max_queries: int
    max_keys: int
    keys: Tensor | None  # [sum of keys] row positions, or None where they are the row itself


@lru_cache(maxsize=4)  # every layer, forward and backward, asks for the same row
def sequences(plan: Plan, device: torch.device) -> Sequences:
    """The sequences of a plan, on `device`."""
    queries = [segment.query[1] - segment.query[0] for segment in plan]
    keys = [sum(stop - start for start, stop in segment.keys) for segment in plan]
    shares = any(len(segment.keys) > 1 for segment in plan)
    rows = torch.cat([torch.arange(*part) for segment in plan for part in segment.keys]) if shares else None

    def moved(x: Tensor) -> Tensor:
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def ends(lengths: list[int]) -> Tensor:
        return moved(torch.tensor([0, *lengths]).cumsum(0).int())

    return Sequences(ends(queries), ends(keys), max(queries), max(keys), None if rows is None else moved(rows))


class _Pick(torch.autograd.Function):
    """Rows of `[N, ...]` by position, some of them several times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # sorts before it adds, so that sums are in a fixed order, where index_add on a GPU takes them as they come
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=rows.device)
        total.index_put_((rows,), grads[0].float(), accumulate=True)
        return total.to(grads[0].dtype), None


def _attend(
    call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, plan: Plan, dropout: float
) -> Tensor:
    """`call` over rows `[N, heads, D]` and their sequences; takes and gives what `reference.attention` does."""
    if dropout:
        raise ValueError("kernels over sequences have no dropout of attention weights; use tuner_varlen")
    if not plan:
        return query.transpose(1, 2)  # of a row without tokens, as it is itself
    laid = sequences(plan, query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if laid.keys is not None:
        k, v = _Pick.apply(k, laid.keys), _Pick.apply(v, laid.keys)
    return call(q.contiguous(), k.contiguous(), v.contiguous(), laid)[None]


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scaling: float, window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`reference.attention` by torch's own FlashAttention."""
    grouped = key.shape[1] != query.shape[1]
    native = "enable_gqa" in varlen.varlen_attn.__annotations__  # from torch 2.12 on

    def call(q: Tensor, k: Tensor, v: Tensor, laid: Sequences) -> Tensor:
        options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
        if grouped and native:
            options["enable_gqa"] = True
        elif grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out: Any = varlen.varlen_attn(
            q, k, v, laid.cu_queries, laid.cu_keys, laid.max_queries, laid.max_keys, **options
        )
        return out

    return _attend(call, query, key, value, plan, dropout)


def _flash(function: Callable[..., Any], scaling: float, window: int | None) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, laid: Sequences) -> Tensor:
        out = function(
            q, k, v, laid.cu_queries, laid.cu_keys, laid.max_queries, laid.max_keys,
            softmax_scale=scaling, causal=True, window_size=(-1 if window is None else window - 1, 0),
            deterministic=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return call


def flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scaling: float, window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`reference.attention` by the flash-attn package (arXiv:2307.08691)."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return _attend(_flash(flash_attn_varlen_func, scaling, window), query, key, value, plan, dropout)


def flash_attention_3(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scaling: float, window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`reference.attention` by FlashAttention 3 (arXiv:2407.08608)."""
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

    return _attend(_flash(flash_attn_varlen_func, scaling, window), query, key, value, plan, dropout)
