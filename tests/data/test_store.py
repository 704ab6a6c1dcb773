"""The store gives back what was put in, in any order, from memory and from files; damaged files are told from good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tuner.data.pack import pack
from tuner.data.store import DTYPES, STEP, Damaged, StoreBuilder, TokenStore, load
from tuner.types import Span, Tokens, span

Plain = tuple[object, ...]


def plain(sample: Tokens) -> Plain:
    """A sample as values that can be compared. A weight of zero is no training, whatever `trained` says."""

    def run(spans: tuple[Span, ...]) -> list[tuple[list[int], float]]:
        return [(s.ids.tolist(), s.weight if s.trained else 0.0) for s in spans]

    return run(sample.trunk), [run(b) for b in sample.branches], sample.source, sample.row


def draw(n: int, seed: int = 0) -> list[Tokens]:
    """Samples of all shapes: no span, empty spans, no trunk, up to three branches, odd weights."""
    rng = np.random.default_rng(seed)

    def run() -> tuple[Span, ...]:
        return tuple(
            span(
                rng.integers(0, 999, int(rng.integers(0, 5))), bool(rng.integers(2)), float(rng.choice([0, 0.1, 1, 3]))
            )
            for _ in range(int(rng.integers(0, 4)))
        )

    return [
        Tokens(
            run(), tuple(run() for _ in range(int(rng.integers(0, 4)))), f"s{rng.integers(3)}", int(rng.integers(99))
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("chunk", [1, 7, 500])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_goes_in_comes_out(chunk: int, on_disk: bool, tmp_path: Path) -> None:
    samples = draw(200)
    with StoreBuilder(tmp_path if on_disk else None) as builder:
        for start in range(0, len(samples), chunk):
            builder.add(samples[start : start + chunk])
        store = TokenStore([builder.finish()])
    assert [plain(s) for s in store] == [plain(s) for s in samples]
    assert [plain(store[i]) for i in (0, 57, -1)] == [plain(samples[i]) for i in (0, 57, -1)]
    assert store.lengths.tolist() == [len(s) for s in samples]
    assert store.trained.tolist() == [s.num_trained for s in samples]
    whole = pack(list(store))
    assert whole.input_ids.tolist() == pack(samples).input_ids.tolist()
    assert whole.weight_sum == pytest.approx(pack(samples).weight_sum)
    with pytest.raises(IndexError):
        store[200]


def test_blocks_orders_and_repeats() -> None:
    a, b = draw(30, seed=1), draw(20, seed=2)
    store = TokenStore([*TokenStore.of(a).blocks, *TokenStore.of(b).blocks])
    order = np.random.default_rng(0).integers(0, 50, 90)
    taken = store.take(order)
    expected = [(a + b)[i] for i in order]
    assert [plain(s) for s in taken] == [plain(s) for s in expected] and len(taken) == 90
    assert [plain(s) for s in taken.take([5, 5, 0])] == [plain(expected[i]) for i in (5, 5, 0)]
    assert [plain(s) for s in taken[10:30:3]] == [plain(s) for s in expected[10:30:3]]
    assert taken.lengths.tolist() == [len(s) for s in expected]
    assert taken.trained.tolist() == [s.num_trained for s in expected]
    assert taken.origin(7) == (expected[7].source, expected[7].row)
    assert taken.content_hash() == TokenStore.of(expected).content_hash() != store.content_hash()
    assert len(store.take([])) == 0 and store.take([]).content_hash() != store.content_hash()


def test_the_hash_does_not_depend_on_how_the_samples_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = draw(100)
    whole = TokenStore.of(samples).content_hash()
    parts = [block for s in (samples[:1], samples[1:60], samples[60:]) for block in TokenStore.of(s).blocks]
    assert TokenStore(parts).content_hash() == whole
    monkeypatch.setattr("tuner.data.store.STEP", 7)
    assert STEP > 100 and TokenStore.of(samples).content_hash() == whole


def test_keys_are_those_of_the_ids() -> None:
    samples = draw(60)
    same = [Tokens((span(s.ids(), True),), source="elsewhere") for s in samples]
    keys = TokenStore.of(samples).keys()
    assert keys.tolist() == TokenStore.of(same).keys().tolist()
    distinct = {tuple(s.ids()) for s in samples}
    assert len(set(keys.tolist())) == len(distinct) > 30


def test_a_trained_id_is_found_only_where_it_is_trained() -> None:
    spans = (span([1, 2], False), span([], True), span([3, 4], True), span([5], True, 0.0))
    (block,) = TokenStore.of([Tokens(()), Tokens((span([9], False),), (spans,))]).blocks
    assert [i for i in range(10) if block.trains_any([i])] == [3, 4]
    assert block.trains_any([1, 4]) and not block.trains_any([])


def test_no_samples_at_all(tmp_path: Path) -> None:
    with StoreBuilder(tmp_path) as builder:
        block = builder.finish()
    store = TokenStore([block])
    assert (len(store), store.lengths.tolist(), store.keys().tolist()) == (0, [], [])
    assert store.content_hash() == TokenStore([]).content_hash()


def test_views_cost_no_copy_and_files_are_read_only(tmp_path: Path) -> None:
    with StoreBuilder(tmp_path) as builder:
        builder.add(draw(50))
        block = builder.finish()
    sample = next(s for s in TokenStore([block]) if len(s) > 3)
    ids = next(s.ids for s in sample.trunk + sum(sample.branches, ()) if len(s.ids))
    assert np.shares_memory(ids, block.ids)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize("name", DTYPES)
def test_damaged_files_are_not_used(name: str, tmp_path: Path) -> None:
    with StoreBuilder(tmp_path) as builder:
        builder.add(draw(50))
        builder.finish()
    load(tmp_path, verify=True)
    path = tmp_path / f"{name}.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Damaged, match=f"{name}.bin has another sha256"):
        load(tmp_path, verify=True)
    path.write_bytes(good[:-1])
    with pytest.raises(Damaged, match=f"{name}.bin has another length"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(Damaged, match=f"{name}.bin"):
        load(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(Damaged):
        load(tmp_path)


@pytest.mark.parametrize("on_disk", [False, True])
def test_scores_of_branches_come_back_and_are_part_of_the_hash(on_disk, tmp_path):
    trunk, branch = (span([1, 2], False),), (span([3], True),)
    samples = [
        Tokens(trunk, (branch, branch), "a.jsonl", 0, (2.5, 0.0)),
        Tokens(trunk, (branch, branch), "a.jsonl", 1),
        Tokens(trunk, (branch,), "a.jsonl", 2, (1.0,)),
        Tokens((span([1, 2], True),), (), "a.jsonl", 3),
    ]
    builder = StoreBuilder(tmp_path if on_disk else None)
    builder.add(samples)
    store = TokenStore([builder.finish()])
    assert [sample.scores for sample in store] == [(2.5, 0.0), (), (1.0,), ()]
    assert store.content_hash() != TokenStore.of([replace(s, scores=()) for s in samples]).content_hash()


def test_which_ids_occur_and_which_are_trained(tmp_path: Path) -> None:
    samples = [Tokens((span([1, 2], False), span([3], True))), Tokens((span([4], False),), ((span([5, 3], True),),))]
    with StoreBuilder(tmp_path) as builder:
        builder.add(samples)
        block = builder.finish()
    assert block.present([0, 2, 3, 5, 9]) == {2, 3, 5}
    assert block.present([]) == block.present([7]) == set()
    assert [block.trains_any([i]) for i in (1, 2, 3, 4, 5, 9)] == [False, False, True, False, True, False]


def test_reach_is_the_trunk_and_the_longest_branch() -> None:
    samples = draw(200, seed=4)
    lengths = [[sum(len(s.ids) for s in run) for run in (sample.trunk, *sample.branches)] for sample in samples]
    wanted = [trunk + max(branches, default=0) for trunk, *branches in lengths]
    assert TokenStore.of(samples).reach.tolist() == wanted
    assert TokenStore.of([]).reach.tolist() == []
