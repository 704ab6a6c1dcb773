"""Packing: every token and every prediction lands where a reader of `Batch` expects it, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from tuner.data.pack import bins, pack, weight_sum
from tuner.types import ALIGNMENT, Batch, Segment, Span, Tokens, joined, parted, span


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_item_once_within_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 140, 200).tolist()
    groups = bins(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(200))
    fill = [sum(lengths[i] for i in group) for group in groups]
    assert all(n <= 100 or len(group) == 1 for n, group in zip(fill, groups, strict=True))
    assert sum(n <= 50 for n in fill) <= 1  # two groups at most half full would have been one
    assert bins(lengths, 100) == groups


def test_bins_take_the_tightest_fit() -> None:
    assert bins([6, 3, 7, 4, 10, 25], 10) == [[5], [4], [2, 1], [0, 3]]
    assert bins([], 10) == []
    assert bins([0, 0], 10) == [[0, 1]]


def reference_bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every group for every item."""
    groups: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [g for g in range(len(groups)) if left[g] > 0 and left[g] >= lengths[i]]
        if fits:
            group = min(fits, key=lambda g: (left[g], g))
        else:
            group = len(groups)
            groups.append([])
            left.append(capacity)
        groups[group].append(i)
        left[group] -= lengths[i]
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_bins_are_those_of_the_slow_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 90, 300).tolist()
    assert bins(lengths, 80) == reference_bins(lengths, 80)


def seconds(work: Callable[[], object]) -> float:
    """Of this process on a core, the best of five, so that other work on the machine counts little."""
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_binning_into_rows_of_128k_tokens_is_near_linear() -> None:
    """Four times the items: quadratic work would take sixteen times as long."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 131_072, 40_000).tolist()
    few, many = seconds(lambda: bins(lengths[:10_000], 131_072)), seconds(lambda: bins(lengths, 131_072))
    assert many < 9 * few, (few, many)
    assert many < 4


def test_packing_rows_of_128k_tokens_is_near_linear() -> None:
    documents = [Tokens((span(np.arange(100), False), span(np.arange(28), True))) for _ in range(1024)]
    row = pack(documents)
    assert (row.num_tokens, len(row.plan), row.num_predictions) == (131_072, 1024, 28 * 1024)
    few, many = seconds(lambda: pack(documents * 2)), seconds(lambda: pack(documents * 8))
    assert many < 10 * few, (few, many)
    one = pack([Tokens((span(np.arange(131_072), True),))])
    assert (one.num_tokens, len(one.plan)) == (131_072, 1)


def test_a_chat_predicts_its_answers_from_the_tokens_before_them() -> None:
    chat = Tokens((span([0, 10, 11], False), span([12, 13], True), span([14], False), span([15], True, 0.5)))
    batch = pack([chat, chat])
    assert batch.input_ids.tolist() == [0, 10, 11, 12, 13, 14, 15] * 2
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6] * 2
    assert batch.doc_ids.tolist() == [0] * 7 + [1] * 7
    assert batch.branch_ids.tolist() == [0] * 14
    assert batch.predict_at.tolist() == [2, 3, 5, 9, 10, 12]
    assert batch.targets.tolist() == [12, 13, 15] * 2
    assert batch.weights.tolist() == [1, 1, 0.5] * 2
    assert batch.seq_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert (batch.seq_doc.tolist(), batch.seq_branch.tolist()) == ([0, 1], [0, 0])
    assert batch.seq_end.tolist() == [6, 13]
    assert batch.plan == (Segment((0, 7), ((0, 7),)), Segment((7, 14), ((7, 14),)))
    assert batch.weight_sum == 5.0


def test_the_last_trunk_token_predicts_the_start_of_every_branch() -> None:
    pair = Tokens(
        (span([0, 5, 6], False),),
        ((span([7, 8], True),), (span([9], True), span([10], False), span([11], True))),
        "pairs.jsonl",
        3,
    )
    batch = pack([Tokens((span([1, 2], True),)), pair])
    assert batch.input_ids.tolist() == [1, 2, 0, 5, 6, 7, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5]  # each branch continues its trunk
    assert batch.branch_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.predict_at.tolist() == [0, 4, 5, 4, 8]
    assert batch.targets.tolist() == [2, 7, 8, 9, 11]
    assert batch.seq_ids.tolist() == [0, 1, 1, 2, 2]
    assert (batch.seq_doc.tolist(), batch.seq_branch.tolist()) == ([0, 1, 1], [0, 1, 2])
    assert batch.seq_end.tolist() == [1, 6, 9]
    assert batch.plan[1:] == (
        Segment((2, 5), ((2, 5),)),
        Segment((5, 7), ((2, 5), (5, 7))),
        Segment((7, 10), ((2, 5), (7, 10))),
    )
    assert batch.rows == (("", 0), ("pairs.jsonl", 3))
    assert batch.per_sequence(torch.ones(5)).tolist() == [1, 2, 2]


def test_a_sequence_ends_at_its_last_token_whether_it_is_trained_or_not() -> None:
    quiet = (span([7], True), span([8, 9], False))
    batch = pack([Tokens((span([0, 5], False),), (quiet, (span([3], True),), quiet)), Tokens((), (quiet,))], multiple=8)
    assert batch.input_ids.tolist()[:12] == [0, 5, 7, 8, 9, 3, 7, 8, 9, 7, 8, 9]
    assert batch.seq_branch.tolist() == [1, 2, 3], "nothing predicts the first token of a document"
    assert batch.seq_end.tolist() == [4, 5, 8]


def test_nothing_predicts_the_first_token_of_a_document() -> None:
    batch = pack([Tokens((span([3], True),)), Tokens((span([4, 5], True),))])
    assert batch.predict_at.tolist() == [1]
    assert batch.targets.tolist() == [5]
    assert batch.seq_doc.tolist() == [1]  # a document without predictions is no sequence


def test_weight_zero_is_the_same_as_not_trained() -> None:
    spans = (span([0], False), span([1, 2], True, 0.0), span([3], True))
    batch = pack([Tokens(spans)])
    assert batch.targets.tolist() == [3]
    assert Tokens(spans).num_trained == 1


def test_an_empty_list_is_an_empty_batch() -> None:
    batch = pack([])
    assert (batch.num_tokens, batch.num_predictions, batch.weight_sum, batch.plan) == (0, 0, 0.0, ())
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32


def random_spans(rng: np.random.Generator) -> tuple[Span, ...]:
    return tuple(
        span(rng.integers(0, 300, int(rng.integers(0, 4))), bool(rng.integers(2)), float(rng.choice([0.0, 0.5, 1.0])))
        for _ in range(int(rng.integers(0, 4)))
    )


@pytest.mark.parametrize("seed", range(20))
def test_weight_sum_is_what_pack_counts(seed: int) -> None:
    """The denominators of a step are counted without packing; empty spans, trunks and branches included."""
    rng = np.random.default_rng(seed)
    samples = [Tokens(random_spans(rng), tuple(random_spans(rng) for _ in range(3))) for _ in range(30)]
    for sample in samples:
        batch = pack([sample])
        assert weight_sum(sample) == batch.weight_sum == float(batch.weights.sum())
        assert len(sample) == batch.num_tokens
    assert sum(map(weight_sum, samples)) == pack(samples).weight_sum


def test_packing_order_moves_documents_whole(random_samples: Callable[..., list[Tokens]]) -> None:
    samples = random_samples(6)
    forth, back = pack(samples), pack(samples[::-1])
    for doc in range(6):
        mine, other = forth.doc_ids == doc, back.doc_ids == 5 - doc
        assert torch.equal(forth.input_ids[mine], back.input_ids[other])
        assert torch.equal(forth.position_ids[mine], back.position_ids[other])
        assert torch.equal(forth.targets[forth.seq_ids == doc], back.targets[back.seq_ids == 5 - doc])


def test_to_keeps_the_plan_on_the_host(random_samples: Callable[..., list[Tokens]]) -> None:
    batch = pack(random_samples(2))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert (moved.plan, moved.rows, moved.weight_sum) == (batch.plan, batch.rows, batch.weight_sum)


# --- one transfer a batch ---


def a_batch(rows: int) -> Batch:
    """Chats, pairs without and with a trunk, and weights that are not 1."""
    rng, samples = np.random.default_rng(rows), []
    for row in range(rows):
        ids = [span(rng.integers(24, 300, int(n)), bool(n % 2), 0.25 * n) for n in rng.integers(1, 9, 4)]
        samples.append(Tokens((ids[0],), ((ids[1],), (ids[2], ids[3])), "rows.jsonl", row))
    return pack(samples)


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_all_tensors_of_a_batch_travel_in_one_piece(rows: int) -> None:
    batch = a_batch(rows)
    tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    assert len(tensors) == 11
    blob = joined(list(tensors.values()))
    assert (
        blob.dtype == torch.uint8 and blob.nbytes < sum(t.nbytes for t in tensors.values()) + len(tensors) * ALIGNMENT
    )
    for (name, tensor), there in zip(tensors.items(), parted(blob, list(tensors.values())), strict=True):
        assert torch.equal(there, tensor) and there.dtype == tensor.dtype and there.shape == tensor.shape, name
        assert there.untyped_storage().data_ptr() == blob.data_ptr()
        assert (there.data_ptr() - blob.data_ptr()) % ALIGNMENT == 0, "kernels read aligned vectors"


def test_a_batch_that_stays_on_the_host_is_not_copied() -> None:
    batch = a_batch(3)
    assert batch.to("cpu").input_ids.data_ptr() == batch.input_ids.data_ptr()


def test_the_host_knows_the_scored_sequences() -> None:
    batch = a_batch(5)
    assert batch.sequences == tuple(zip(batch.seq_doc.tolist(), batch.seq_branch.tolist(), strict=True))
