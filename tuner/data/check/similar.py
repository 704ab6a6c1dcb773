"""Texts -> which are equal, and which are nearly equal, in linear time and with some bytes a row.

A near-duplicate is a text whose set of character 8-grams (lower case, runs of white space as one blank) shares at least
`THRESHOLD` of the union with another's (Jaccard). Candidates come from MinHash in bands (Broder 1997): the hashes of a
set lie on a circle, and the signature of a set is the first hash at or after each of 64 fixed points on it, so that two
sets agree at a point with the probability of their Jaccard similarity, whatever their sizes. This is one-permutation
hashing with rotation (Li, Owen and Zhang, arXiv 1208.1259; Shrivastava and Li, arXiv 1406.4784). 16 bands of 4 find a
pair of similarity 0.8 with a probability above 0.99 if the texts are long. Who calls verifies the candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

THRESHOLD = 0.8
WIDTH = 8  # characters of a shingle
MAX_CHARACTERS = 100_000  # of a text that are looked at
BANDS, ROWS = 16, 4
CANDIDATES = 3  # for each text, those that share most bands
BUCKET = 8  # texts looked at of those that share a band with one: boilerplate would have thousands

_SEED = 0x5EED
_POINTS = np.arange(BANDS * ROWS, dtype=np.uint64) << np.uint64(64 - 6)
_ODD = np.random.Generator(np.random.PCG64(_SEED)).integers(0, 2**63, ROWS, np.uint64) * np.uint64(2) + np.uint64(1)
assert BANDS * ROWS == 2**6


def normalised(text: str) -> str:
    """Without case, and with one blank for every run of white space."""
    return " ".join(text.casefold().split())


def key(parts: Iterable[str]) -> int:
    """64 bits that stand for a list of texts, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def shingles(text: str) -> np.ndarray:
    """The set of `WIDTH`-grams of a normalised text as sorted 64-bit hashes; a shorter text is one shingle.

    Returns:
        uint64 [distinct shingles]; empty for an empty text.
    """
    codes = np.frombuffer(text[:MAX_CHARACTERS].encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if not len(codes):
        return np.empty(0, np.uint64)
    number = max(1, len(codes) - WIDTH + 1)
    mixed = np.zeros(number, np.uint64)
    for j in range(min(WIDTH, len(codes))):
        mixed = mixed * np.uint64(0x100000001B3) + codes[j : j + number]
    return np.unique(_mix(mixed + np.uint64(_SEED)))


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads 64-bit values over all bits (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bands(text: str) -> np.ndarray:
    """The MinHash bands of a normalised text: uint32 [BANDS]. Zeros for an empty text."""
    found = shingles(text)
    if not len(found):
        return np.zeros(BANDS, np.uint32)
    signature = found[np.searchsorted(found, _POINTS) % len(found)].reshape(ROWS, BANDS)  # a band: points far apart
    return (_mix((signature * _ODD[:, None]).sum(0)) >> np.uint64(32)).astype(np.uint32)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared part of the union of two sets, given as sorted distinct values; 0 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def candidates(these: np.ndarray, others: np.ndarray) -> dict[int, list[int]]:
    """For each text of `these` up to `CANDIDATES` of `others` that may be near-duplicates, the likeliest first.

    Args:
        these, others: uint32 [texts, BANDS], from `bands`.
    """
    votes: dict[int, dict[int, int]] = {}
    for band in range(BANDS):
        order = np.argsort(others[:, band], kind="stable")
        column = others[order, band]
        first = np.searchsorted(column, these[:, band], side="left")
        last = np.searchsorted(column, these[:, band], side="right")
        for i in np.flatnonzero((last > first) & (these[:, band] != 0)):
            mine = votes.setdefault(int(i), {})
            for j in order[first[i] : min(last[i], first[i] + BUCKET)].tolist():
                mine[j] = mine.get(j, 0) + 1
    return {
        i: sorted(found, key=lambda j, f=found: (-f[j], j))[:CANDIDATES]  # type: ignore[misc]
        for i, found in sorted(votes.items())
    }


def equal_to(these: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each key of `these` the first index in `others` that has it, or -1: int64 [len(these)]."""
    if not len(others):
        return np.full(len(these), -1, np.int64)
    values, first = np.unique(others, return_index=True)
    at = np.minimum(np.searchsorted(values, these), len(values) - 1)
    return np.where(values[at] == these, first[at], -1).astype(np.int64)
