"""Tokens -> Batch: packing, padding-free rows and prefix sharing are one function."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from tuner.types import Batch, Segment, Tokens, span


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` (tokens) grouped so that no group exceeds `capacity`: best-fit decreasing.

    An item longer than `capacity` gets a group of its own. The result depends on the arguments alone, so every rank
    works out the same one.
    """
    order = np.lexsort((np.arange(len(lengths)), -np.asarray(lengths, dtype=np.int64))).tolist()
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}  # tokens left -> groups with that much room, a heap
    rooms = 0  # bit n is set where `open_groups` has n: the tightest fit is one shift away, however many there are
    for i in order:
        n = int(lengths[i])
        fits = rooms >> n
        if fits:
            left = n + (fits & -fits).bit_length() - 1
            group = heapq.heappop(open_groups[left])
            groups[group].append(i)
            if not open_groups[left]:
                del open_groups[left]
                rooms ^= 1 << left
            left -= n
        else:
            groups.append([i])
            left, group = capacity - n, len(groups) - 1
        if left > 0:
            if left not in open_groups:
                open_groups[left] = []
                rooms |= 1 << left
            heapq.heappush(open_groups[left], group)
    return groups


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
    documents: list[Tokens] = list(samples)
    if multiple > 1 and (filler := -sum(map(len, documents)) % multiple):
        documents.append(Tokens((span([0] * filler, False),)))
    runs, plan = _runs(documents)
    counts, docs, branches, trunk_starts, trunk_stops = np.asarray(runs, np.int64).reshape(-1, 5).T
    spans = [s for sample in documents for part in (sample.trunk, *sample.branches) for s in part]
    ids = np.concatenate([np.empty(0, np.int32), *(s.ids for s in spans)]).astype(np.int64)  # [N]
    span_weights = np.asarray([s.weight if s.trained else 0.0 for s in spans], np.float32)
    weights = np.repeat(span_weights, [len(s.ids) for s in spans])  # [N]
    starts = np.cumsum(counts) - counts  # of each run in the row
    trunk_lengths = np.where(branches > 0, trunk_stops - trunk_starts, 0)
    before = np.arange(len(ids)) - 1  # the state that predicts each token
    begins = starts[counts > 0]
    # the last trunk state predicts the first token of every branch; nothing comes before the first of a document
    before[begins] = np.where(trunk_lengths > 0, trunk_stops - 1, -1)[counts > 0]
    scored = np.flatnonzero((weights != 0) & (before >= 0))
    run_of = np.repeat(np.arange(len(counts)), counts)  # [N]
    sequences, seq_ids = np.unique(run_of[scored], return_inverse=True)
    weights = weights[scored]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.arange(len(ids)) + (trunk_lengths - starts)[run_of]),
        doc_ids=torch.from_numpy(docs[run_of]),
        branch_ids=torch.from_numpy(branches[run_of]),
        predict_at=torch.from_numpy(before[scored]),
        targets=torch.from_numpy(ids[scored]),
        weights=torch.from_numpy(weights),
        seq_ids=torch.from_numpy(seq_ids),
        seq_doc=torch.from_numpy(docs[sequences]),
        seq_branch=torch.from_numpy(branches[sequences]),
        seq_end=torch.from_numpy((starts + counts)[sequences] - 1),
        plan=plan,
        rows=tuple((s.source, s.row) for s in samples),
        sequences=tuple(zip(docs[sequences].tolist(), branches[sequences].tolist(), strict=True)),
        weight_sum=float(weights.astype(np.float64).sum()),
    )


def _runs(documents: Sequence[Tokens]) -> tuple[list[tuple[int, ...]], tuple[Segment, ...]]:
    """Of each trunk and branch, in the order of the row: tokens, document, branch, where its trunk begins and ends in
    the row; and the attention plan."""
    runs: list[tuple[int, ...]] = []
    plan: list[Segment] = []
    at = 0
    for doc, sample in enumerate(documents):
        first = trunk = at
        for branch, spans in enumerate((sample.trunk, *sample.branches)):
            n = sum(len(s.ids) for s in spans)
            runs.append((n, doc, branch, first, trunk))
            if n:
                own = (at, at + n)
                plan.append(Segment(own, ((first, trunk), own) if branch and trunk > first else (own,)))
            at += n
            if not branch:
                trunk = at
    return runs, tuple(plan)
