"""Tokens -> flat arrays, in memory or in files, and back: samples that cost bytes instead of objects.

The arrays of a block are, each little-endian, and as a file raw:

    ids          int32 [T]      of all samples, one after another: trunk, then branches
    span_ends    int64 [P + 1]  where each span begins and ends in `ids`
    weights      float64 [P]    of each span; 0 where it is not trained
    run_ends     int64 [R + 1]  where each run (a trunk or a branch) begins and ends in spans
    scores       float64 [R]    of each branch, if the data says so; else NaN
    sample_ends  int64 [S + 1]  where each sample begins and ends in runs
    rows         int64 [S]      the row of each sample in its source
    names        int32 [S]      its source, as an index of the header's list
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from tuner.types import Span, Tokens

DTYPES = {
    "ids": "<i4",
    "span_ends": "<i8",
    "weights": "<f8",
    "run_ends": "<i8",
    "scores": "<f8",
    "sample_ends": "<i8",
    "rows": "<i8",
    "names": "<i4",
}
ENDS = ("span_ends", "run_ends", "sample_ends")
HEADER = "store.json"
STEP = 16_384  # samples worked on at once, where a copy of all would be large


class Damaged(Exception):
    """Files that do not hold what their header says."""


@dataclass(frozen=True, eq=False)
class Block:
    """The arrays of one store, as the head of this file describes them, and the names of the sources."""

    ids: np.ndarray
    span_ends: np.ndarray
    weights: np.ndarray
    run_ends: np.ndarray
    scores: np.ndarray
    sample_ends: np.ndarray
    rows: np.ndarray
    names: np.ndarray
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where each sample begins and ends in `ids`: `[S + 1]`."""
        return self.span_ends[self.run_ends[self.sample_ends]]

    def sample(self, i: int) -> Tokens:
        """Sample `i`; its ids are views."""
        runs = self.run_ends[self.sample_ends[i] : self.sample_ends[i + 1] + 1].tolist()
        ends = self.span_ends[runs[0] : runs[-1] + 1].tolist()
        weights = self.weights[runs[0] : runs[-1]].tolist()
        spans = [
            Span(self.ids[start:stop], weight != 0, weight or 1.0)
            for start, stop, weight in zip(ends[:-1], ends[1:], weights, strict=True)
        ]
        parts = [tuple(spans[a - runs[0] : b - runs[0]]) for a, b in zip(runs[:-1], runs[1:], strict=True)]
        scores: tuple[float, ...] = ()
        if len(parts) > 1:
            found = self.scores[self.sample_ends[i] + 1 : self.sample_ends[i + 1]].tolist()
            scores = () if math.isnan(found[0]) else tuple(found)
        return Tokens(parts[0], tuple(parts[1:]), self.sources[self.names[i]], int(self.rows[i]), scores)

    def reach(self) -> np.ndarray:
        """Tokens of the trunk and of the longest branch of each sample: `[S]`."""
        runs, trunks = np.diff(self.span_ends[self.run_ends]), self.sample_ends[:-1]
        if not len(trunks):
            return np.empty(0, np.int64)
        branches = runs.copy()
        branches[trunks] = 0
        return runs[trunks] + np.maximum.reduceat(branches, trunks)

    def trained(self) -> np.ndarray:
        """Tokens of each sample that are prediction targets: `[S]`."""
        lengths = np.where(self.weights != 0, np.diff(self.span_ends), 0)
        sums = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(sums[self.run_ends[self.sample_ends]])

    def scored(self) -> np.ndarray:
        """Whether the data says how good the answers of each sample are: bool `[S]`."""
        first, branched = self.sample_ends[:-1], np.diff(self.sample_ends) > 1
        return branched & ~np.isnan(self.scores[np.where(branched, first + 1, first)])

    def gaps(self) -> np.ndarray:
        """By how much the score of an answer is at least above that of the next one; NaN if unsaid: float64 `[S]`."""
        steps = np.append(self.scores[:-1] - self.scores[1:], math.nan)  # NaN beside a trunk, which has no score
        return np.fmin.reduceat(steps, self.sample_ends[:-1])

    def trains_any(self, wanted: Sequence[int]) -> bool:
        """Whether any of the ids `wanted` is a prediction target somewhere."""
        for found in self._find(wanted):
            spans = np.searchsorted(self.span_ends, found, side="right") - 1
            if (self.weights[spans] != 0).any():
                return True
        return False

    def present(self, wanted: Sequence[int]) -> set[int]:
        """Those of the ids `wanted` that occur somewhere."""
        return {int(i) for found in self._find(wanted) for i in np.unique(self.ids[found])}

    def _find(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """Where in `ids` the ids `wanted` are, a stretch at a time."""
        step = 1 << 22
        for start in range(0, len(self.ids), step):
            yield start + np.flatnonzero(np.isin(self.ids[start : start + step], wanted))


class TokenStore(Sequence[Tokens]):
    """Samples in blocks of flat arrays, seen in an order that may leave some out and repeat others.

    A sample is made anew each time that it is asked for, with views of the arrays, so two of the same index are
    equal in content and not in identity.

    Args:
        blocks: where the samples lie.
        order: `[n]` indices into all samples of the blocks, one block after another; None takes each once.
    """

    def __init__(self, blocks: Sequence[Block], order: np.ndarray | None = None) -> None:
        self.blocks = tuple(blocks)
        self._starts = np.cumsum([0, *map(len, self.blocks)])  # [blocks + 1]
        self._order = order

    @classmethod
    def of(cls, samples: Iterable[Tokens]) -> TokenStore:
        """A store in memory of any samples; a store is given back as it is."""
        if isinstance(samples, TokenStore):
            return samples
        builder = StoreBuilder()
        builder.add(list(samples))
        return cls([builder.finish()])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> TokenStore: ...

    def __getitem__(self, index: int | slice) -> Tokens | TokenStore:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"sample {at} of {len(self)}")
        return self._sample(at % len(self))

    def __iter__(self) -> Iterator[Tokens]:
        return map(self._sample, range(len(self)))

    def _sample(self, at: int) -> Tokens:
        found = at if self._order is None else int(self._order[at])
        block = int(np.searchsorted(self._starts, found, side="right")) - 1 if len(self.blocks) > 1 else 0
        return self.blocks[block].sample(found - int(self._starts[block]))

    def take(self, indices: Sequence[int] | np.ndarray) -> TokenStore:
        """The samples at `indices`, in that order, without a copy of the arrays; an index may occur several times."""
        chosen = np.asarray(indices, dtype=np.int64)
        return TokenStore(self.blocks, chosen if self._order is None else self._order[chosen])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, all branches included: int64 `[n]`."""
        return self._in_order([np.diff(block.bounds) for block in self.blocks])

    @cached_property
    def reach(self) -> np.ndarray:
        """Positions that each sample takes, trunk and longest branch: int64 `[n]`."""
        return self._in_order([block.reach() for block in self.blocks])

    @cached_property
    def trained(self) -> np.ndarray:
        """Prediction targets of each sample: int64 `[n]`."""
        return self._in_order([block.trained() for block in self.blocks])

    @cached_property
    def branches(self) -> np.ndarray:
        """Answers to the prompt of each sample, 0 where there is only a trunk: int64 `[n]`."""
        return self._in_order([np.diff(block.sample_ends) - 1 for block in self.blocks])

    @cached_property
    def scored(self) -> np.ndarray:
        """Whether the data says how good the answers of each sample are, by scores, margin or label: bool `[n]`."""
        return self._in_order([block.scored() for block in self.blocks]).astype(bool)

    @cached_property
    def gaps(self) -> np.ndarray:
        """By how much the score of an answer is at least above that of the next one; the margin of a pair. NaN where
        the data does not say: float64 `[n]`."""
        return self._in_order([block.gaps() for block in self.blocks]).astype(np.float64)

    def origin(self, index: int) -> tuple[str, int]:
        """The source and the row of a sample."""
        sample = self[index]
        return sample.source, sample.row

    def _in_order(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        values = np.concatenate([np.empty(0, np.int64), *parts])
        return values if self._order is None else values[self._order]

    def keys(self) -> np.ndarray:
        """A number of each sample that its ids decide, the same wherever it lies: uint64 `[n]`."""
        parts = []
        for block in self.blocks:
            ids, bounds = block.ids.view(np.uint8).data, (4 * block.bounds).tolist()
            digests = (hashlib.sha256(ids[a:b]).digest()[:8] for a, b in itertools.pairwise(bounds))
            parts.append(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64))
        values = np.concatenate([np.empty(0, np.uint64), *parts])
        return values if self._order is None else values[self._order]

    def content_hash(self) -> str:
        """sha256 over ids, masks, weights and scores, in order; where the samples come from is no part of it."""
        digests = {name: hashlib.sha256() for name in ("runs", "spans", "lengths", "weights", "scores", "ids")}
        for block, samples in self.pieces():
            firsts, counts = block.sample_ends[samples], block.sample_ends[samples + 1] - block.sample_ends[samples]
            runs = _ranges(firsts, counts)
            span_counts = block.run_ends[runs + 1] - block.run_ends[runs]
            spans = _ranges(block.run_ends[runs], span_counts)
            lengths = block.span_ends[spans + 1] - block.span_ends[spans]
            digests["runs"].update(counts.astype("<i8").data)
            digests["spans"].update(span_counts.astype("<i8").data)
            digests["lengths"].update(lengths.astype("<i8").data)
            digests["weights"].update(np.ascontiguousarray(block.weights[spans]).data)
            digests["scores"].update(np.ascontiguousarray(block.scores[runs]).data)
            digests["ids"].update(np.ascontiguousarray(block.ids[_ranges(block.span_ends[spans], lengths)]).data)
        return hashlib.sha256(b"".join(d.digest() for d in digests.values())).hexdigest()

    def pieces(self) -> Iterator[tuple[Block, np.ndarray]]:
        """The samples in order, some at a time: a block and indices `[at most STEP]` in it."""
        for start in range(0, len(self), STEP):
            stop = min(start + STEP, len(self))
            found = np.arange(start, stop) if self._order is None else self._order[start:stop]
            blocks = np.searchsorted(self._starts, found, side="right") - 1
            for part in np.split(np.arange(len(found)), np.flatnonzero(np.diff(blocks)) + 1):
                at = int(blocks[part[0]])
                yield self.blocks[at], found[part] - self._starts[at]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[start, start + count)` of each, one after another."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


class StoreBuilder:
    """Takes samples a chunk at a time and gives a block: in memory, or in files of `directory` as they come.

    Use it as a context manager where it writes files, so that they are closed whatever happens.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._sinks: dict[str, _Memory | _File] = {
            name: _Memory(dtype) if directory is None else _File(directory / f"{name}.bin")
            for name, dtype in DTYPES.items()
        }
        self._sources: dict[str, int] = {}
        self._ends = dict.fromkeys(ENDS, 0)
        for name in ENDS:
            self._sinks[name].append(np.zeros(1, np.int64))

    def __enter__(self) -> StoreBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks.values():
            sink.close()

    def add(self, samples: Sequence[Tokens]) -> None:
        """Appends samples."""
        if not samples:
            return
        runs = [run for sample in samples for run in (sample.trunk, *sample.branches)]
        spans = [span for run in runs for span in run]
        if spans:
            self._append("ids", np.concatenate([span.ids for span in spans]))
        self._append_ends("span_ends", [len(span.ids) for span in spans])
        self._append("weights", [span.weight if span.trained else 0.0 for span in spans])
        self._append_ends("run_ends", [len(run) for run in runs])
        unknown = math.nan
        scores = ((unknown, *(s.scores or (unknown,) * len(s.branches))) for s in samples)
        self._append("scores", list(itertools.chain.from_iterable(scores)))
        self._append_ends("sample_ends", [1 + len(sample.branches) for sample in samples])
        self._append("rows", [sample.row for sample in samples])
        self._append("names", [self._sources.setdefault(s.source, len(self._sources)) for s in samples])

    def finish(self) -> Block:
        """The block; of files, with a header beside them. Nothing can be added any more."""
        sources = tuple(self._sources)
        if self.directory is None:
            arrays = {name: sink.array() for name, sink in self._sinks.items() if isinstance(sink, _Memory)}
            return Block(**arrays, sources=sources)
        entries = {name: sink.entry() for name, sink in self._sinks.items() if isinstance(sink, _File)}
        (self.directory / HEADER).write_text(json.dumps({"sources": sources, "arrays": entries}), encoding="utf-8")
        return load(self.directory)

    def _append(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        self._sinks[name].append(np.asarray(values, dtype=DTYPES[name]))

    def _append_ends(self, name: str, lengths: Sequence[int]) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        if len(ends):
            self._ends[name] = int(ends[-1])
        self._append(name, ends)


class _Memory:
    """An array that grows in place: the system moves pages instead of copying them."""

    def __init__(self, dtype: str) -> None:
        self._values, self._length = np.empty(1024, dtype), 0

    def append(self, values: np.ndarray) -> None:
        stop = self._length + len(values)
        if stop > len(self._values):
            self._values.resize(max(stop, 2 * len(self._values)), refcheck=False)
        self._values[self._length : stop] = values
        self._length = stop

    def array(self) -> np.ndarray:
        self._values.resize(self._length, refcheck=False)
        return self._values

    def close(self) -> None:
        """Nothing to close."""


class _File:
    """A file that only grows, and the sha256 of what is in it."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._bytes = path.open("wb"), hashlib.sha256(), 0

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data
        self._file.write(data)
        self._digest.update(data)
        self._bytes += data.nbytes

    def entry(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        # after a write that failed, closing tries to write the rest once more
        with contextlib.suppress(OSError):
            self._file.close()


def load(directory: Path, *, verify: bool = False) -> Block:
    """The block in the files of `directory`, memory-mapped and read-only. `verify` compares their sha256 too.

    Raises:
        Damaged: a file is missing, or is not what the header says.
    """
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        arrays = {name: _mapped(directory / f"{name}.bin", name, header["arrays"][name], verify) for name in DTYPES}
        return Block(**arrays, sources=tuple(header["sources"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{directory}: {error}") from None


def _mapped(path: Path, name: str, entry: dict[str, Any], verify: bool) -> np.ndarray:
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path.name} has another length than its header says")
    if not entry["bytes"]:
        return np.empty(0, DTYPES[name])
    # a plain array: each slice of a memmap would be one again, which takes its time
    values = np.memmap(path, DTYPES[name], mode="r").view(np.ndarray)
    if verify and hashlib.sha256(values.data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} has another sha256 than its header says")
    return values
