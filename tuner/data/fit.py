"""Samples of answers -> those that a loss can use: so many answers, a label or a margin where it reads one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tuner.data.store import TokenStore


@dataclass(frozen=True)
class Fit:
    """What a loss reads of every row.

    Args:
        answers: how many answers a row may have; the last number stands for itself and all above it with `or_more`.
        wants: what is said of rows with another number, as in `this loss compares pairs; give ...`.
        margins: what is said of rows whose answers have no scores; empty if the loss does not read them.
    """

    answers: tuple[int, ...]
    wants: str
    or_more: bool = False
    margins: str = ""

    def fault(self, answers: int, scored: bool) -> str:
        """Why a row with so many answers, with scores or without, cannot be used; empty if it can."""
        if answers not in self.answers and not (self.or_more and answers > self.answers[-1]):
            return f"the row has {answers} answer{'' if answers == 1 else 's'}, and {self.wants}"
        return self.margins if not scored else ""

    def faults(self, store: TokenStore) -> Iterator[tuple[np.ndarray, str]]:
        """The samples that cannot be used, as indices into the store, by what is wrong with them."""
        shapes = np.stack([store.branches, store.scored.astype(np.int64)], axis=1)
        for answers, scored in np.unique(shapes, axis=0).tolist():
            if said := self.fault(answers, bool(scored)):
                yield np.flatnonzero((shapes == (answers, scored)).all(1)), said
