"""Rendered samples -> the few lines about them that a training run prints before it begins.

What it costs is a fraction of tokenising: arrays are looked at, not texts, and near-duplicates not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.data.check import similar
from tuner.data.check.findings import MIN_ROWS, Place, places
from tuner.data.check.report import LengthBias
from tuner.data.store import Block, TokenStore

SHOWN = 3  # rows named of each finding
HINT = "tuner data check RECIPE looks closer"


def brief(train: TokenStore, held_out: TokenStore | None, *, bos: int | None, terminators: Sequence[int]) -> list[str]:
    """At most nine lines: what is odd about the samples, or that nothing is.

    Args:
        bos: id of BOS; None if the tokenizer has none.
        terminators: ids that end an answer; none where not only answers are trained.
    """
    keys = train.keys()
    origins = _origins(train)  # [samples, 2]
    first = similar.equal_to(keys, keys)
    # a row may be there twice by the weight of its source, and a text in several pieces
    again = np.flatnonzero((origins[first] != origins).any(1))
    again = again[np.unique(origins[again], axis=0, return_index=True)[1]]
    missing, doubled = _bos(train, bos)
    lines = [
        _line(train, again, "repeat an earlier row to the token"),
        _line(train, missing, "do not begin with BOS"),
        _line(train, doubled, "begin with two BOS"),
        _line(train, _unfinished(train, terminators), "train an answer without its terminator"),
        _line(train, _far(train.lengths), "have more than 10 times the tokens that 99% of them stay within"),
    ]
    if held_out is not None:
        shared = np.flatnonzero(similar.equal_to(held_out.keys(), keys) >= 0)
        lines.append(_line(held_out, shared, "are training rows too, to the token", "held-out samples"))
    lines += [_line(train, _without_margin(train), "are pairs without a margin, though others have one"), _label(train)]
    if (bias := _bias(train)) is not None and bias.far:
        said = f"the longer answer is preferred in {100 * bias.accuracy:.1f}% of {bias.comparisons:,} pairs"
        lines.append(f"warning: {said}, so length nearly tells which one")
    found = [line for line in lines if line]
    return [*found, HINT] if found else [f"nothing odd at a glance; {HINT}"]


def _line(store: TokenStore, samples: np.ndarray, what: str, of: str = "samples") -> str:
    if not len(samples):
        return ""
    named = places([Place(*store.origin(int(i))) for i in samples[:SHOWN]])
    return f"warning: {len(samples):,} of {len(store):,} {of} {what}: {named}{', ...' if len(samples) > SHOWN else ''}"


def _origins(store: TokenStore) -> np.ndarray:
    """Source (as a number) and row of each sample: int64 `[samples, 2]`."""
    numbers: dict[str, int] = {}
    parts = [np.empty((0, 2), np.int64)]
    for block, at in store.pieces():
        known = np.asarray([numbers.setdefault(name, len(numbers)) for name in block.sources], np.int64)
        parts.append(np.stack([known[block.names[at]], block.rows[at]], axis=1))
    return np.concatenate(parts)


def _bos(store: TokenStore, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The samples that do not begin with BOS, and those that begin with two."""
    lacks, twice = [np.empty(0, bool)], [np.empty(0, bool)]
    for block, at in store.pieces() if bos is not None else ():
        starts, sizes = block.bounds[at], block.bounds[at + 1] - block.bounds[at]
        begins = (sizes > 0) & (block.ids[np.where(sizes > 0, starts, 0)] == bos)
        lacks.append(~begins)
        twice.append(begins & (sizes > 1) & (block.ids[np.where(sizes > 1, starts + 1, 0)] == bos))
    return np.flatnonzero(np.concatenate(lacks)), np.flatnonzero(np.concatenate(twice))


def _unfinished(store: TokenStore, terminators: Sequence[int]) -> np.ndarray:
    """The samples with a run of trained tokens that ends in no terminator."""
    if not terminators:
        return np.empty(0, np.int64)
    found = {id(block): _unfinished_in(block, terminators) for block in store.blocks}
    return np.flatnonzero(np.concatenate([np.empty(0, bool), *(found[id(b)][at] for b, at in store.pieces())]))


def _unfinished_in(block: Block, terminators: Sequence[int]) -> np.ndarray:
    trained = block.weights != 0
    goes_on = np.append(trained[1:], False)  # bool [spans], whether the next one is trained
    goes_on[block.run_ends[1:][np.diff(block.run_ends) > 0] - 1] = False  # the next one is of another run
    ends = np.flatnonzero(trained & ~goes_on & (np.diff(block.span_ends) > 0))
    bad = ends[~np.isin(block.ids[block.span_ends[ends + 1] - 1], terminators)]
    counts = np.bincount(bad, minlength=len(trained)) if len(trained) else np.empty(0, np.int64)
    before = np.concatenate([[0], np.cumsum(counts)])
    return np.diff(before[block.run_ends[block.sample_ends]]) > 0


def _far(lengths: np.ndarray) -> np.ndarray:
    if len(lengths) < MIN_ROWS:
        return np.empty(0, np.int64)
    return np.flatnonzero(lengths > 10 * np.percentile(lengths, 99))


def _without_margin(store: TokenStore) -> np.ndarray:
    """The pairs of which the data says no margin; none if it says none of any."""
    pairs = store.branches == 2
    return np.flatnonzero(pairs & ~store.scored) if (pairs & store.scored).any() else np.empty(0, np.int64)


def _label(store: TokenStore) -> str:
    """A line about labelled answers that all have one label; empty if there are none, or of both kinds."""
    if not len(store) or not ((store.branches == 1) & store.scored).all():
        return ""
    labels = {float(value) for block, at in store.pieces() for value in block.scores[block.sample_ends[at] + 1]}
    if len(labels) > 1:
        return ""
    label = "true" if labels == {1.0} else "false"
    return f"warning: all of {len(store):,} answers are labelled {label}, so nothing tells good from bad ones"


def _bias(store: TokenStore) -> LengthBias | None:
    """Of the samples with two branches, of which the first is preferred."""
    sizes = [np.empty((0, 2), np.int64)]
    for block, at in store.pieces():
        pairs = at[np.diff(block.sample_ends)[at] == 3]  # a trunk and two branches
        runs = np.diff(block.span_ends[block.run_ends])
        sizes.append(np.stack([runs[block.sample_ends[pairs] + branch] for branch in (1, 2)], axis=1))
    both = np.concatenate(sizes)
    return LengthBias.of_pairs(both[:, 0], both[:, 1]) if len(both) else None
