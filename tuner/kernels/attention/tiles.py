"""A plan -> the tables that tell each program of the Triton kernels what to compute.

A query tile is a run of queries of one segment. The keys that it sees are counted in positions of its document, trunk
first: position j lies in row `trunk + j` while j < length, and in row `behind + j` after. So a branch behind its trunk
is plain causal attention over positions, and a window is a difference of positions.

A key tile is a run of keys of one segment. The queries that see it are rows of its own segment and, if that is a trunk,
of the branches. These follow their trunk in the row, so they are one run, which ends where the document does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tuner.kernels.attention.reference import Plan

QUERY_COLUMNS = 8  # of which five are read: a tile of 32 bytes begins where the last one ends, aligned
KEY_COLUMNS = 4
REMEMBERED = 4  # rows whose tables are kept


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tables of a row, on its device. Tiles come in order of falling work: programs that start last are short."""

    queries: Tensor  # [query tiles, 8] int32: first row, row behind the last, `trunk`, `length`, `behind`
    keys: Tensor  # [key tiles, 4] int32: first row, row behind the last, ends of the segment and of the queries
    positions: Tensor  # [N] int32, of each token in its document
    longest: int  # positions of the longest document, over its longest branch


@dataclass(frozen=True)
class _Run:
    """A segment as the tables see it."""

    start: int
    stop: int
    trunk: int  # where its document begins
    length: int  # of its trunk, 0 without one
    last: int  # where the queries that see its keys end


def mean_length(plan: Plan) -> float:
    """Mean queries of a segment."""
    return plan[-1].query[1] / len(plan) if plan else 0.0


def _runs(plan: Plan, rows: int) -> list[_Run]:
    """The segments of a row of `rows` tokens.

    Raises:
        ValueError: the plan is not one that `tuner.data.pack` makes: each trunk, then its branches, one behind another.
    """
    runs: list[_Run] = []
    at = 0
    for (first, last), group in groupby(plan, key=lambda segment: segment.keys[0]):
        document = tuple(group)
        for branch, segment in enumerate(document):
            keys = ((first, last), segment.query) if branch else (segment.query,)
            if segment.query[0] != at or segment.query[1] <= at or segment.keys != keys:
                raise ValueError(
                    f"the Triton attention needs each trunk, then its branches, one behind another, not {segment} "
                    f"after {at} tokens; set model.attn_implementation: tuner_varlen"
                )
            at = segment.query[1]
        runs += [
            _Run(*s.query, first, last - first if b else 0, s.query[1] if b else at) for b, s in enumerate(document)
        ]
    if at != rows:
        raise ValueError(f"the plan covers {at} tokens, and the row has {rows}")
    return runs


def _query_tiles(runs: Sequence[_Run], size: int) -> list[list[int]]:
    tiles = []
    for run in runs:
        behind = run.start - run.length
        for start in range(run.start, run.stop, size):
            stop = min(start + size, run.stop)
            tiles.append([start, stop, run.trunk, run.length, behind, 0, 0, 0])
    return sorted(tiles, key=lambda tile: tile[4] - tile[1])


def _key_tiles(runs: Sequence[_Run], size: int) -> list[list[int]]:
    tiles = []
    for run in runs:
        for start in range(run.start, run.stop, size):
            tiles.append([start, min(start + size, run.stop), run.stop, run.last])
    return sorted(tiles, key=lambda tile: tile[0] - tile[3])


def build(plan: Plan, rows: int, query_size: int, key_size: int, device: torch.device) -> Tiles:
    """The tables of a row of `rows` tokens, for tiles of the two sizes."""
    runs = _runs(plan, rows)
    queries, keys = _query_tiles(runs, query_size), _key_tiles(runs, key_size)
    positions = [torch.arange(run.length, run.length + run.stop - run.start, dtype=torch.int32) for run in runs]
    # one transfer for all; every part but the last is a multiple of 16 bytes
    parts = [torch.tensor(queries, dtype=torch.int32).flatten(), torch.tensor(keys, dtype=torch.int32).flatten()]
    packed = torch.cat([*parts, *positions])
    packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
    a, b = len(parts[0]), len(parts[0]) + len(parts[1])
    longest = max((run.length + run.stop - run.start for run in runs), default=0)
    return Tiles(packed[:a].view(-1, QUERY_COLUMNS), packed[a:b].view(-1, KEY_COLUMNS), packed[b:], longest)


_recent: list[tuple[Plan, tuple[object, ...], Tiles]] = []


def tiles(plan: Plan, rows: int, query_size: int, key_size: int, device: torch.device) -> Tiles:
    """`build`, once a row: every layer asks for the same one, with the same object as its plan."""
    asked = (rows, query_size, key_size, device)
    for known, of, found in tuple(_recent):
        if known is plan and of == asked:  # hashing a plan takes longer than starting a kernel
            return found
    made = build(plan, rows, query_size, key_size, device)
    _recent[:] = [(plan, asked, made), *_recent[: REMEMBERED - 1]]
    return made
