"""What happened to every row on its way to tokens -> counts with row ids, for people and for the manifest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.data.store import TokenStore
from tuner.types import Tokens

MAX_PLACES = 20  # row ids kept for each kind of count
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# kind -> what people read; the order is the order of the report
KINDS = {
    "skipped": "rows skipped as unusable (data.on_bad_row: skip)",
    "unfit": "rows skipped as of no use to the loss (data.on_bad_row: skip)",
    "dropped": "rows dropped as longer than data.max_length (data.overlong: drop)",
    "cut_away": "rows dropped because data.overlong: truncate left nothing to train on",
    "cut_equal": "rows dropped because data.overlong: truncate left two answers that are the same",
    "truncated": "rows cut at data.max_length (data.overlong: truncate)",
    "split": "rows split into pieces of data.max_length (data.overlong: split)",
    "not_sampled": "rows left out by the weight of their source",
    "repeated": "rows repeated by the weight of their source",
    "held_out": "rows held out for evaluation",
    "empty_answers": "rows with an empty trained answer",
    "no_instruction": "rows without a system instruction, which data.ghost_attention leaves as they are",
    "control_text": "rows that spell out control tokens in their text (kept as plain text)",
}


def place(source: str, row: int) -> str:
    """`data.jsonl line 3` or `data.parquet row 3`, counted from 1; `row` is counted from 0."""
    name = source.lower()
    name = next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
    return f"{source} {'line' if name.endswith(('.jsonl', '.ndjson')) else 'row'} {row + 1}"


def listed(names: Iterable[str]) -> str:
    """`a, b, ...`: at most ten names, each of at most 60 characters."""
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in itertools.islice(names, 11)]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


@dataclass
class RowCount:
    """How many rows something happened to, and the first of them."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    reason: str = ""  # of the first one, where there is more to say than the kind

    def add(self, where: str, reason: str = "", times: int = 1) -> None:
        self.count += times
        self.reason = self.reason or reason
        if len(self.places) < MAX_PLACES:
            self.places.append(where)


@dataclass
class DataReport:
    """Counts of one split: rows in, samples out, and whatever happened in between, with row ids up to a bound."""

    rows_read: int = 0
    samples: int = 0
    tokens: int = 0  # that the model runs over
    trained_tokens: int = 0  # prediction targets with a weight
    lost_tokens: int = 0  # of rows dropped or cut by data.max_length
    sources: list[str] = field(default_factory=list)  # each with its format and why it was chosen
    unread_columns: Counter[str] = field(default_factory=Counter)  # columns that the format has no use for -> rows
    counts: dict[str, RowCount] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what this machine could not do; no property of the data

    def count(self, kind: str, where: str, reason: str = "", times: int = 1) -> None:
        """Notes that `kind` happened to the row at `where`."""
        assert kind in KINDS, kind
        self.counts.setdefault(kind, RowCount()).add(where, reason, times)

    def count_many(self, kind: str, wheres: Iterable[str], times: int) -> None:
        """Notes that `kind` happened to `times` rows, of which `wheres` need not give more than the first."""
        if not times:
            return
        entry = self.counts.setdefault(kind, RowCount())
        entry.count += times
        entry.places += [where for where, _ in zip(wheres, range(MAX_PLACES - len(entry.places)), strict=False)]

    def number(self, kind: str) -> int:
        """How many rows `kind` happened to."""
        return self.counts[kind].count if kind in self.counts else 0

    def measure(self, tokens: Iterable[Tokens]) -> None:
        """Sets the numbers of samples and tokens from the samples themselves."""
        store = TokenStore.of(tokens)
        self.samples = len(store)
        self.tokens = int(store.lengths.sum())
        self.trained_tokens = int(store.trained.sum())

    def merge(self, other: DataReport) -> None:
        """Adds what happened to the rows of another source; samples and tokens are measured, not added."""
        self.rows_read += other.rows_read
        self.lost_tokens += other.lost_tokens
        self.sources += other.sources
        self.notes += other.notes
        self.unread_columns.update(other.unread_columns)
        for kind, entry in other.counts.items():
            self.count_many(kind, entry.places, entry.count)
            self.counts[kind].reason = self.counts[kind].reason or entry.reason

    def copy(self) -> DataReport:
        """An independent copy."""
        counts = {k: replace(c, places=list(c.places)) for k, c in self.counts.items()}
        return replace(
            self,
            sources=list(self.sources),
            notes=list(self.notes),
            unread_columns=self.unread_columns.copy(),
            counts=counts,
        )

    def lines(self) -> list[str]:
        """The report for people."""
        share = 100 * self.trained_tokens / self.tokens if self.tokens else 0.0
        out = list(self.sources)
        out.append(f"{self.rows_read:,} rows read, {self.samples:,} samples")
        out.append(f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained ({share:.1f}%)")
        if self.lost_tokens:
            out.append(f"{self.lost_tokens:,} tokens lost to data.max_length")
        return out + self.odd()

    def odd(self) -> list[str]:
        """For people: what is not read, what was left out or changed, and the notes; nothing where all is well."""
        out = []
        if self.unread_columns:
            found = (f"{listed([name])} ({n:,})" for name, n in self.unread_columns.most_common(11))
            out.append(f"columns that are not read (rows): {listed(found)}")
        for kind, text in KINDS.items():
            if entry := self.counts.get(kind):
                shown = ", ".join(entry.places[:5]) + (", ..." if entry.count > min(len(entry.places), 5) else "")
                out.append(f"{entry.count:,} {text}: {shown}" + (f" (first: {entry.reason})" if entry.reason else ""))
        return out + self.notes

    def as_dict(self) -> dict[str, Any]:
        """The report for the manifest: plain JSON values."""
        return {
            "rows_read": self.rows_read,
            "samples": self.samples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "lost_tokens": self.lost_tokens,
            "sources": list(self.sources),
            "unread_columns": dict(self.unread_columns),
            "counts": {
                kind: {"count": entry.count, "rows": list(entry.places), "reason": entry.reason}
                for kind, entry in ((k, self.counts[k]) for k in KINDS if k in self.counts)
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """The report that `as_dict` gave these values of."""
        counts = {k: RowCount(c["count"], list(c["rows"]), c["reason"]) for k, c in values["counts"].items()}
        plain = {k: values[k] for k in ("rows_read", "samples", "tokens", "trained_tokens", "lost_tokens")}
        return cls(
            **plain, sources=list(values["sources"]), unread_columns=Counter(values["unread_columns"]), counts=counts
        )
