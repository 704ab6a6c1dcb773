from __future__ import annotations

import time

import numpy as np
import pytest

from tuner.data.plan import Plan
from tuner.errors import DataError


def plan(n=10, **settings):
    lengths = np.random.default_rng(0).integers(1, 40, n)
    return Plan(lengths, **({"batch_size": 4, "microbatch_tokens": 50} | settings))


def flat(rows):
    return [i for r in rows for i in r]


@pytest.mark.parametrize("settings", [{}, {"batch_unit": "tokens", "batch_size": 60}, {"packing": False}])
def test_every_epoch_sees_every_sample_once_and_in_an_order_of_its_own(settings):
    p = plan(50, num_epochs=3, **settings)
    epochs: dict[int, list[int]] = {}
    for step in range(p.num_steps):
        epochs.setdefault(p.epoch_of(step), []).extend(p.samples(step))
        assert sorted(flat(p.microbatches(step))) == sorted(p.samples(step))
    assert sorted(epochs) == [0, 1, 2]
    assert all(sorted(seen) == list(range(50)) for seen in epochs.values())
    assert len({tuple(seen) for seen in epochs.values()}) == 3
    assert p.epochs_done(0) == 0 and p.epochs_done(p.num_steps) == 3


def test_steps_are_rows_over_batch_rounded_up_times_epochs():
    p = plan(10, num_epochs=3)
    assert (p.steps_per_epoch, p.num_steps) == (3, 9)
    assert [len(p.samples(s)) for s in range(3)] == [4, 4, 2]
    assert plan(10, num_epochs=0.5).num_steps == 2
    assert plan(10, num_epochs=1.5).num_steps == 5
    assert plan(120, num_epochs=0.1).num_steps == 3
    assert plan(10, num_epochs=0.001).num_steps == 1
    assert plan(10, num_epochs=3, max_steps=2).num_steps == 2
    assert plan(10, num_epochs=1, max_steps=20).num_steps == 20
    assert plan(10, num_epochs=1, max_steps=20).epoch_of(19) == 6


def test_token_batches_fill_up_to_the_batch_and_no_further():
    lengths = [30, 40, 50, 200, 10, 10, 60]
    p = Plan(lengths, batch_size=100, batch_unit="tokens", num_epochs=4)
    for step in range(p.num_steps):
        total = sum(lengths[i] for i in p.samples(step))
        assert total <= 100 or p.samples(step) == [3]
        if step + 1 < p.num_steps and p.epoch_of(step + 1) == p.epoch_of(step):
            assert total + lengths[p.samples(step + 1)[0]] > 100
    assert p.num_steps == sum(1 for s in range(100) if p.epoch_of(s) < 4)


@pytest.mark.parametrize("batch_unit", ["examples", "tokens"])
def test_what_is_in_a_step_depends_on_neither_ranks_nor_microbatches(batch_unit):
    settings = {"batch_unit": batch_unit, "batch_size": 8 if batch_unit == "examples" else 150, "num_epochs": 2}
    base = plan(60, **settings)
    for change in ({"world_size": 3}, {"microbatch_tokens": 17}, {"packing": False}, {"max_steps": 99}):
        other = plan(60, **settings | change)
        assert other.fingerprint() == base.fingerprint()
        for step in range(base.num_steps):
            assert other.samples(step) == base.samples(step)
            ranks = [other.microbatches(step, rank) for rank in range(other.world_size)]
            assert len({len(rows) for rows in ranks}) == 1
            assert sorted(flat(flat(ranks))) == sorted(base.samples(step))
            for group in flat(ranks):
                assert len(group) <= 1 or sum(other.lengths[group]) <= other.microbatch_tokens
                assert other.packing or len(group) <= 1


def test_fillers_only_make_ranks_equal():
    p = Plan([10] * 5, batch_size=5, packing=False, world_size=4)
    ranks = [p.microbatches(0, rank) for rank in range(4)]
    assert [len(rows) for rows in ranks] == [2] * 4
    assert sum(not group for group in flat(ranks)) == 3


def test_a_plan_is_a_pure_function_of_its_arguments_and_the_step():
    once = [plan(30, num_epochs=4, seed=5).microbatches(s) for s in range(32)]
    fresh = plan(30, num_epochs=4, seed=5)
    assert [fresh.microbatches(s) for s in reversed(range(32))] == once[::-1]
    assert [plan(30, num_epochs=4, seed=6).microbatches(s) for s in range(32)] != once


def test_fingerprint_sees_what_decides_the_steps():
    base = plan().fingerprint()
    assert base == plan().fingerprint()
    changes = [{"n": 11}, {"batch_size": 5}, {"seed": 1}, {"batch_unit": "tokens"}]
    assert len({plan(**c).fingerprint() for c in changes} | {base}) == len(changes) + 1


def test_an_empty_train_set_has_no_plan():
    with pytest.raises(DataError, match="the train set is empty"):
        Plan([], batch_size=4)


def test_a_million_rows_are_planned_quickly():
    start = time.perf_counter()
    lengths = np.random.default_rng(0).integers(10, 500, 1_000_000)
    for settings in ({"batch_size": 64}, {"batch_size": 4096 * 64, "batch_unit": "tokens"}):
        p = Plan(lengths, microbatch_tokens=4096, num_epochs=2, **settings)
        assert p.microbatches(p.num_steps - 1)
    assert time.perf_counter() - start < 5
