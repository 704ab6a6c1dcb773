"""Samples of answers -> those that a loss can use: so many answers, a label or a margin where it reads one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tuner.data.store import TokenStore
from tuner.types import Tokens


@dataclass(frozen=True)
class Fit:
    """What a loss reads of every row.

    Args:
        answers: how many answers a row may have; the last number stands for itself and all above it with `or_more`.
        wants: what is said of rows with another number, as in `this loss compares pairs; give ...`.
        margins: what is said of rows whose answers have no scores; empty if the loss does not read them.
        positive: a margin says how much better the chosen answer is, so that it cannot be below 0.
    """

    answers: tuple[int, ...]
    wants: str
    or_more: bool = False
    margins: str = ""
    positive: bool = False

    def fault(self, sample: Tokens) -> str:
        """Why a sample cannot be used; empty if it can."""
        gap = min((a - b for a, b in itertools.pairwise(sample.scores)), default=math.nan)
        return self._fault(len(sample.branches), bool(sample.scores), gap)

    def faults(self, store: TokenStore) -> Iterator[tuple[np.ndarray, str]]:
        """The samples that cannot be used, as indices into the store, by what is wrong with them."""
        signs = np.sign(np.nan_to_num(store.gaps, nan=1.0)).astype(np.int64)  # what is unsaid is no fault
        shapes = np.stack([store.branches, store.scored.astype(np.int64), signs], axis=1)
        for shape in np.unique(shapes, axis=0):
            found = np.flatnonzero((shapes == shape).all(1))
            if said := self._fault(int(shape[0]), bool(shape[1]), float(store.gaps[found[0]])):
                yield found, said

    def _fault(self, answers: int, scored: bool, gap: float) -> str:
        """Of a row with so many answers, with scores or without, the least step of which is `gap`."""
        if answers not in self.answers and not (self.or_more and answers > self.answers[-1]):
            return f"the row has {answers} answer{'' if answers == 1 else 's'}, and {self.wants}"
        if answers > 2 and gap == 0:
            return "the row has two answers of one score, so that neither is the better one; leave one of them out"
        if self.positive and gap < 0:
            return (
                f"the row has a margin of {gap:g}, by which the rejected answer would be the better one; swap the two, "
                "or mend the margin"
            )
        return self.margins if not scored else ""
