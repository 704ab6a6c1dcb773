"""Tokens -> Batch: packing, padding-free rows and prefix sharing are one function."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from tuner.types import Batch, Segment, Span, Tokens, span


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` (tokens) grouped so that no group exceeds `capacity`: best-fit decreasing.

    An item longer than `capacity` gets a group of its own. The result depends on the arguments alone, so every rank
    works out the same one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for i in order:
        n = lengths[i]
        at = bisect.bisect_left(room, (n, -1))
        if at == len(room):
            groups.append([i])
            left, group = capacity - n, len(groups) - 1
        else:
            left, group = room.pop(at)
            groups[group].append(i)
            left -= n
        if left > 0:
            bisect.insort(room, (left, group))
    return groups


class _Row:
    """Collects the columns of one flat row while documents are laid into it."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.docs: list[np.ndarray] = []
        self.branches: list[np.ndarray] = []
        self.predict_at: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.seq_ids: list[np.ndarray] = []
        self.seq_doc: list[int] = []
        self.seq_branch: list[int] = []
        self.plan: list[Segment] = []
        self.length = 0

    def add(self, spans: Sequence[Span], *, doc: int, branch: int, trunk: tuple[int, int]) -> None:
        """Lays one run of spans (the trunk, or one branch after the trunk at row positions `trunk`)."""
        start, trunk_len = self.length, trunk[1] - trunk[0]
        ids = np.concatenate([s.ids for s in spans]).astype(np.int64) if spans else np.empty(0, np.int64)
        weights = [np.full(len(s.ids), s.weight if s.trained else 0.0, np.float32) for s in spans]
        weight = np.concatenate(weights) if weights else np.empty(0, np.float32)
        n = len(ids)
        before = np.arange(start - 1, start + n - 1)  # the state that predicts each token
        if branch and n:
            before[0] = trunk[1] - 1  # the last trunk state predicts the first token of every branch
        has_state = np.ones(n, bool)
        has_state[:1] = trunk_len > 0  # nothing comes before the first token of a document
        scored = np.flatnonzero((weight != 0) & has_state)
        self.ids.append(ids)
        self.positions.append(np.arange(trunk_len, trunk_len + n))
        self.docs.append(np.full(n, doc))
        self.branches.append(np.full(n, branch))
        if n:
            own = (start, start + n)
            self.plan.append(Segment(own, (own,) if branch == 0 or not trunk_len else (trunk, own)))
        if len(scored):
            self.predict_at.append(before[scored])
            self.targets.append(ids[scored])
            self.weights.append(weight[scored])
            self.seq_ids.append(np.full(len(scored), len(self.seq_doc)))
            self.seq_doc.append(doc)
            self.seq_branch.append(branch)
        self.length += n


def weight_sum(sample: Tokens) -> float:
    """Sum of the weights of what `pack` makes predictions of: nothing predicts the first token of a document."""
    total = sum(len(s.ids) * s.weight for spans in (sample.trunk, *sample.branches) for s in spans if s.trained)
    has_trunk = any(len(s.ids) for s in sample.trunk)
    for spans in (sample.trunk,) if has_trunk else sample.branches:  # without a trunk every branch is a beginning
        first = next((s for s in spans if len(s.ids)), None)
        total -= first.weight if first is not None and first.trained else 0.0
    return total


def pack(samples: Sequence[Tokens], multiple: int = 1) -> Batch:
    """Lays the samples one after another in a flat row, each branch after its trunk.

    Every document starts at position 0 and sees itself alone; a branch continues the positions of its trunk and sees
    the trunk and itself. An empty list gives an empty batch. With `multiple` the row is filled up to a multiple of it
    by one more document, of which nothing is predicted and which none of the others sees.
    """
    row = _Row()
    for doc, sample in enumerate(samples):
        start = row.length
        row.add(sample.trunk, doc=doc, branch=0, trunk=(start, start))
        trunk = (start, row.length)
        for branch, spans in enumerate(sample.branches, start=1):
            row.add(spans, doc=doc, branch=branch, trunk=trunk)
    if filler := -row.length % multiple:
        row.add([span([0] * filler, False)], doc=len(samples), branch=0, trunk=(row.length, row.length))

    def long(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)

    weights = np.concatenate(row.weights).astype(np.float32) if row.weights else np.empty(0, np.float32)
    return Batch(
        input_ids=long(row.ids),
        position_ids=long(row.positions),
        doc_ids=long(row.docs),
        branch_ids=long(row.branches),
        predict_at=long(row.predict_at),
        targets=long(row.targets),
        weights=torch.from_numpy(weights),
        seq_ids=long(row.seq_ids),
        seq_doc=torch.tensor(row.seq_doc, dtype=torch.int64),
        seq_branch=torch.tensor(row.seq_branch, dtype=torch.int64),
        plan=tuple(row.plan),
        rows=tuple((s.source, s.row) for s in samples),
        weight_sum=float(weights.astype(np.float64).sum()),
    )
