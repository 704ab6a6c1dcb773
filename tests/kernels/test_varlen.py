"""Attention by kernels over sequences: the index tables around them, with a plain-torch stand-in for the library.

The libraries need a GPU. What they compute, attention of sequences of different lengths aligned at their ends, fits in
a few lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_attention import DIM, dense, qkv, row, run
from tuner.kernels import attention
from tuner.kernels.attention import varlen
from tuner.kernels.attention.reference import segment_mask
from tuner.model.attention import dense_mask
from tuner.types import Batch


def by_sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, left: int, right: int,
) -> Tensor:  # fmt: skip
    """`[N, heads, D]` each -> causal attention of each sequence, over `left` keys behind its own (-1: all)."""
    assert right == 0 and cu_q.dtype == cu_k.dtype == torch.int32 and all(x.is_contiguous() for x in (q, k, v))
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    out = []
    for i in range(len(cu_q) - 1):
        at, of = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        ks, vs = (x[of].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        seen = segment_mask(len(q[at]), len(ks), None if left < 0 else left + 1, q.device)
        scores = (torch.einsum("qhd,khd->hqk", q[at], ks) * scale).masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    return torch.cat(out)


def torchs(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`varlen_attn` of torch 2.11, where key heads are as many as query heads."""
    assert k.shape[1] == q.shape[1]
    return by_sequences(q, k, v, cu_q, cu_k, max_q, max_k, scale, *window_size)


def torchs_grouped(*args: Any, enable_gqa: bool = False, scale: float, window_size: tuple[int, int]) -> Tensor:
    """`varlen_attn` of torch 2.12 and later."""
    assert enable_gqa or args[0].shape[1] == args[1].shape[1]
    return by_sequences(*args, scale, *window_size)


def flashs(*args: Any, softmax_scale: float, causal: bool, window_size: tuple[int, int], deterministic: bool) -> Tensor:
    assert causal and deterministic
    return by_sequences(*args, softmax_scale, *window_size)


@pytest.fixture(params=["varlen", "varlen_grouped", "flash_attention_2", "flash_attention_3"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an implementation whose library is stood in for."""
    name: str = request.param
    if name.startswith("varlen"):
        monkeypatch.setattr(varlen.varlen, "varlen_attn", torchs if name == "varlen" else torchs_grouped)
    else:
        module = attention.PACKAGES[name]
        answer = (lambda *a, **k: (flashs(*a, **k), None)) if name == "flash_attention_3" else flashs
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=answer))
    return name.removesuffix("_grouped")


def attend(name: str, batch: Batch, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.load(name)(q, k, v, batch.plan, scaling=DIM**-0.5, window=window)

    return call


def check(name: str, batch: Batch, window: int | None, kv_heads: int = 2, asked: int | None = None) -> None:
    tensors = qkv(batch.num_tokens, kv_heads, torch.float32)
    exact = run(dense(dense_mask(batch, window)), *(t.double() for t in tensors))
    found = run(attend(name, batch, window if asked is None else asked), *tensors)
    for mine, same in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), same, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_sequences_are_the_dense_mask(implementation: str, kv_heads: int, window: int | None) -> None:
    for seed in range(2):
        check(implementation, row(seed), window, kv_heads)


def test_rows_without_branches_are_not_copied() -> None:
    batch = row(documents=1)
    assert varlen.sequences(batch.plan, torch.device("cpu")).keys is None


def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen.varlen, "varlen_attn", torchs)
    with pytest.raises(AssertionError):
        check("varlen", row(), 7, asked=8)

    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Of the copies of a row one counts."""
        (rows,) = ctx.saved_tensors
        return torch.zeros(ctx.shape).index_copy(0, rows, grads[0]), None

    monkeypatch.setattr(varlen._Pick, "backward", staticmethod(once))
    with pytest.raises(AssertionError):
        check("varlen", row(), None)


def test_an_empty_row_and_dropout(implementation: str) -> None:
    q, k, v, _ = qkv(0, 2, torch.float32)
    assert attention.load(implementation)(q, k, v, (), scaling=1.0).shape == (1, 0, 4, DIM)
    with pytest.raises(ValueError, match="no dropout of attention weights"):
        attention.load(implementation)(q, k, v, (), scaling=1.0, dropout=0.1)
