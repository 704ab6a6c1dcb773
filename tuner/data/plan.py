"""Lengths of samples -> the seeded order in which training sees them: steps, and microbatches of each rank."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tuner.data.pack import bins
from tuner.errors import DataError


class Plan:
    """Which samples make each optimizer step, and how a step is divided into microbatches.

    A pure function of its arguments and the step, so that a resumed run needs the number of its step only. Every epoch
    has an order of its own, drawn from (seed, epoch); a step never crosses an epoch, and an epoch's last step is as
    large as what is left. Neither `world_size` nor `packing` nor `microbatch_tokens` changes what is in a step.

    Args:
        lengths: tokens of each sample.
        batch_size: samples of a step (`batch_unit: examples`); or tokens (`tokens`): samples are taken in order until
            the next would exceed it, and one that alone exceeds it makes a step of its own.
        microbatch_tokens: capacity of a packed microbatch.
        num_epochs: may be fractional; `max_steps` wins over it.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        batch_unit: Literal["examples", "tokens"] = "examples",
        microbatch_tokens: int = 2048,
        packing: bool = True,
        num_epochs: float = 1.0,
        max_steps: int | None = None,
        seed: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)  # [rows]
        if not len(self.lengths):
            raise DataError("there is nothing to train on: the train set is empty")
        assert batch_size > 0 and microbatch_tokens > 0 and num_epochs > 0 and world_size > 0
        self.batch_size, self.batch_unit, self.seed = batch_size, batch_unit, seed
        self.microbatch_tokens, self.packing, self.world_size = microbatch_tokens, packing, world_size
        self._starts = [0]  # first step of each epoch, as far as worked out
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # epoch -> order [rows], bounds [steps + 1]
        self.steps_per_epoch = self._steps_of(0)  # of the first epoch; with `tokens` another may differ a little
        self.num_steps = max_steps if max_steps is not None else self._count_steps(num_epochs)

    def samples(self, step: int) -> list[int]:
        """The samples of a step, over all ranks, in order."""
        epoch = self.epoch_of(step)
        order, bounds = self._epoch(epoch)
        first = step - self._starts[epoch]
        return [int(i) for i in order[bounds[first] : bounds[first + 1]]]

    def microbatches(self, step: int, rank: int = 0) -> list[list[int]]:
        """The microbatches of a step that a rank runs, as sample indices; `[]` is a weightless filler.

        Every rank gets the same number of them.
        """
        assert 0 <= rank < self.world_size
        samples = self.samples(step)
        if self.packing:
            groups = bins([int(n) for n in self.lengths[samples]], self.microbatch_tokens)
            rows = [[samples[i] for i in group] for group in groups]
        else:
            rows = [[i] for i in samples]
        # fullest first, so that what runs at the same time on all ranks is about equally long
        rows.sort(key=lambda row: -int(self.lengths[row].sum()))
        rows += [[] for _ in range(-len(rows) % self.world_size)]
        return rows[rank :: self.world_size]

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that a step belongs to."""
        assert step >= 0
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self._steps_of(len(self._starts) - 1))
        return bisect_right(self._starts, step) - 1

    def epochs_done(self, step: int) -> float:
        """Epochs done once `step` steps are, as a fraction."""
        epoch = self.epoch_of(step)
        return epoch + (step - self._starts[epoch]) / self._steps_of(epoch)

    def fingerprint(self) -> str:
        """sha256 of all that decides which samples are in which step."""
        digest = hashlib.sha256(f"{self.batch_size} {self.batch_unit} {self.seed} ".encode())
        digest.update(self.lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def _count_steps(self, num_epochs: float) -> int:
        part, whole = math.modf(num_epochs)
        if self.batch_unit == "examples":
            steps = int(whole) * self.steps_per_epoch  # every epoch has as many
        else:
            steps = sum(self._steps_of(epoch) for epoch in range(int(whole)))
        # a hair less than the product, so that 0.1 x 30 is 3 steps and not 4
        return max(1, steps + (math.ceil(part * self._steps_of(int(whole)) - 1e-9) if part else 0))

    def _steps_of(self, epoch: int) -> int:
        if self.batch_unit == "examples":
            return -(-len(self.lengths) // self.batch_size)
        return len(self._epoch(epoch)[1]) - 1

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # an epoch and its neighbour are all that training asks for
                del self._orders[next(iter(self._orders))]
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.lengths))
            self._orders[epoch] = (order, self._bounds(order))
        return self._orders[epoch]

    def _bounds(self, order: np.ndarray) -> np.ndarray:
        n = len(order)
        if self.batch_unit == "examples":
            return np.append(np.arange(0, n, self.batch_size), n)
        ends = np.cumsum(self.lengths[order])  # [rows] tokens up to and with each sample
        bounds, done = [0], 0
        while bounds[-1] < n:
            stop = int(np.searchsorted(ends, done + self.batch_size, side="right"))
            stop = max(stop, bounds[-1] + 1)  # a sample longer than a batch makes a step alone
            bounds.append(stop)
            done = int(ends[stop - 1])
        return np.asarray(bounds)
