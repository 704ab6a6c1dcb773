"""The attention plan against a dense mask written out, in float64: grouped heads, branches, windows and gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.data.pack import pack
from tuner.kernels.attention import reference as segments
from tuner.kernels.attention.reference import segment_mask
from tuner.model.attention import dense_mask, tuner_varlen
from tuner.types import Batch, Tokens, span

HEADS, DIM = 4, 16


def row(seed: int = 0, documents: int = 4) -> Batch:
    """Documents of random lengths; every other one has branches."""
    rng = np.random.default_rng(seed)
    samples = []
    for doc in range(documents):
        n = [int(x) for x in rng.integers(1, 20, 4)]
        branches = tuple((span(range(k), True),) for k in n[1:]) if doc % 2 else ()
        samples.append(Tokens((span(range(n[0]), False),), branches))
    return pack(samples)


def qkv(n: int, kv_heads: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, HEADS, n, DIM), (1, kv_heads, n, DIM), (1, kv_heads, n, DIM), (1, n, HEADS, DIM)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> list[Tensor]:
    """[output, dq, dk, dv] for the given q, k, v and incoming gradient."""
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    output = attend(q, k, v)
    output.backward(tensors[3])
    return [output.detach(), *(t.grad for t in (q, k, v))]  # type: ignore[list-item]


def varlen(batch: Batch, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module = nn.Module()
        return tuner_varlen(
            module, q, k, v, None, scaling=DIM**-0.5, sliding_window=window, tuner_plan=batch.plan
        )[0]  # fmt: skip

    return attend


def dense(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return attend


def test_the_rule_on_a_row_that_can_be_read() -> None:
    batch = pack([Tokens((span([1, 2], False),), ((span([3], True),), (span([4, 5], True),))), Tokens((span([6], 0),))])
    seen = ["1.....", "11....", "111...", "11.1..", "11.11.", ".....1"]
    assert dense_mask(batch)[0, 0].int().tolist() == [[int(c == "1") for c in line] for line in seen]
    windowed = ["1.....", "11....", ".11...", ".1.1..", "...11.", ".....1"]  # two positions, measured along the branch
    assert dense_mask(batch, 2)[0, 0].int().tolist() == [[int(c == "1") for c in line] for line in windowed]


def test_a_segment_mask_is_aligned_bottom_right() -> None:
    device = torch.device("cpu")
    assert segment_mask(2, 4, None, device).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert segment_mask(2, 4, 2, device).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_the_plan_is_the_dense_mask(kv_heads: int, window: int | None, seed: int) -> None:
    batch = row(seed)
    tensors = qkv(batch.num_tokens, kv_heads, torch.float32)
    exact = run(dense(dense_mask(batch, window)), *(t.double() for t in tensors))
    for mine, same in zip(run(varlen(batch, window), *tensors), exact, strict=True):
        torch.testing.assert_close(mine.double(), same, rtol=0, atol=5e-6)


def test_documents_in_a_row_are_documents_alone() -> None:
    whole = row(documents=3)
    tensors = qkv(whole.num_tokens, 2, torch.float32)
    together = run(varlen(whole), *tensors)
    for doc in range(3):
        at = (whole.doc_ids == doc).nonzero()[:, 0]
        first = int(at[0])
        plan = tuple(s for s in whole.plan if whole.doc_ids[s.query[0]] == doc)
        moved = tuple(
            type(s)((s.query[0] - first, s.query[1] - first), tuple((a - first, b - first) for a, b in s.keys))
            for s in plan
        )

        def alone(q: Tensor, k: Tensor, v: Tensor, moved: object = moved) -> Tensor:
            return tuner_varlen(nn.Module(), q, k, v, None, scaling=DIM**-0.5, tuner_plan=moved)[0]  # type: ignore

        own = run(alone, *(t[:, :, at] for t in tensors[:3]), tensors[3][:, at])
        torch.testing.assert_close(own[0], together[0][:, at], rtol=0, atol=1e-6)
        for mine, same in zip(own[1:], together[1:], strict=True):
            torch.testing.assert_close(mine, same[:, :, at], rtol=0, atol=1e-6)


def check_bf16_error(
    attend: Callable[[Batch, int | None], Callable[[Tensor, Tensor, Tensor], Tensor]], kv_heads: int, window: int | None
) -> None:
    """Invariant 11 for attention: against float64, at most 1.5 times the error of torch's own sdpa in bf16."""
    batch = row(3, documents=6)
    mask = dense_mask(batch, window)
    tensors = qkv(batch.num_tokens, kv_heads, torch.bfloat16)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

    exact = run(dense(mask), *(t.double() for t in tensors))
    for name, a, b, x in zip("oqkv", run(attend(batch, window), *tensors), run(torchs, *tensors), exact, strict=True):
        error, allowed = (a.double() - x).norm(), 1.5 * (b.double() - x).norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 7])
def test_the_bf16_error_is_no_worse_than_that_of_plain_torch(kv_heads: int, window: int | None) -> None:
    check_bf16_error(varlen, kv_heads, window)


def test_mutant_a_window_off_by_one_and_a_plan_of_one_document() -> None:
    with pytest.raises(AssertionError):
        check_bf16_error(lambda batch, window: varlen(batch, 8), 2, 7)
    with pytest.raises(AssertionError):
        check_bf16_error(lambda batch, window: varlen(pack([Tokens((span(batch.input_ids, True),))])), 2, None)


def test_a_call_without_a_plan_is_refused() -> None:
    q, k, v, _ = qkv(3, 2, torch.float32)
    with pytest.raises(RuntimeError, match="without a plan"):
        tuner_varlen(nn.Module(), q, k, v, None, scaling=1.0)


@pytest.mark.parametrize("window", [None, 9])
def test_long_segments_go_another_way(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with segments above and below the limit, in bf16, against a dense mask in fp32."""
    batch = row(seed=3, documents=8)
    tensors = qkv(batch.num_tokens, 2, torch.bfloat16)
    wanted = run(dense(dense_mask(batch, window)), *(t.float() for t in tensors))
    for limit in (0, 12, 1024):
        monkeypatch.setattr(segments, "SHORT", limit)
        short, long = segments._split(batch.plan, limit)
        assert bool(short) == (limit > 0) and bool(long) == (limit < 1024)
        for mine, exact in zip(run(varlen(batch, window), *tensors), wanted, strict=True):
            torch.testing.assert_close(mine.float(), exact, rtol=0, atol=0.05)
