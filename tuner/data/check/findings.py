"""What may be wrong with data -> findings: how often, in which rows, what it means and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tuner.data.report import place

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MIN_ROWS = 20  # for a row to be far from the rest
MAX_ROWS = 100  # rows kept of each finding; the count is of all


class Kind(NamedTuple):
    """`meaning` goes on from a count, as in `3 rows that ...`."""

    severity: Severity
    meaning: str
    remedy: str


# The order is the order of the report. Rows that cannot be used stop training unless data.on_bad_row: skip.
KINDS: dict[str, Kind] = {
    "unreadable": Kind("error", "rows that cannot be read", "mend or remove them"),
    "unusable": Kind("error", "rows that cannot be used", "mend or remove them"),
    "unknown_role": Kind(
        "error", "rows with a role that the format or the chat template does not know", "rename the role"
    ),
    "nothing_to_train": Kind(
        "error", "rows with nothing to train on", "remove them, or change data.train_on or data.max_length"
    ),
    "lone_surrogate": Kind(
        "error", "rows with half of a surrogate pair, which no tokenizer takes", "replace it in the file"
    ),
    "same_completions": Kind(
        "error", "preference rows with two answers that are the same, of which neither is better", "remove them"
    ),
    "empty_side": Kind("error", "preference rows with an empty answer", "remove them, or fill them in"),
    "unfit": Kind(
        "error", "rows whose answers the loss of this recipe cannot use", "mend or remove them, or change the loss"
    ),
    "wrong_kind": Kind(
        "error",
        "rows of another kind than this stage trains on",
        "name another file, set data.format, or run another stage",
    ),
    "nothing_left": Kind("error", "rows, of which none is left to train on", "give a file with usable rows"),
    "bos_doubled": Kind("error", "rows with a doubled BOS", "remove BOS from the text, or from the chat template"),
    "bos_missing": Kind("error", "rows without BOS at their beginning", "choose another data.chat_template"),
    "too_long": Kind("error", "rows longer than data.max_length", "raise data.max_length, or set data.overlong"),
    "terminator_missing": Kind(
        "warning",
        "rows with a trained answer that lacks its terminator, so that they do not teach to stop",
        "raise data.max_length, set data.overlong: drop, or choose another data.chat_template",
    ),
    "control_text": Kind(
        "warning",
        "rows that spell out control tokens, which stay plain text",
        "remove them from the text; for a pre-templated text you trust set data.parse_control_tokens",
    ),
    "empty_answer": Kind("warning", "rows with an empty trained answer", "remove them, or fill them in"),
    "empty_turn": Kind("warning", "rows with an empty text or user turn", "remove them, or fill them in"),
    "role_order": Kind("warning", "rows whose turns come in an odd order", "merge, move or add turns"),
    "repeated": Kind("warning", "rows that repeat an earlier one (but for case and white space)", "keep one of each"),
    "overlap": Kind(
        "warning",
        "eval rows that are training rows too (but for case and white space)",
        "remove them from one side: they measure memory",
    ),
    "overlap_near": Kind(
        "warning", "eval rows that are nearly a training row", "look at them, and remove them from one side"
    ),
    "overlap_prompt": Kind(
        "note", "eval rows whose prompt is that of a training row, with another answer", "split the data by prompt"
    ),
    "cut_equal": Kind(
        "warning",
        "preference rows whose answers begin alike as far as data.max_length reaches, and are dropped",
        "raise data.max_length",
    ),
    "blank_difference": Kind(
        "warning", "preference rows whose completions differ in white space only", "remove them, or mend the export"
    ),
    "one_label": Kind(
        "warning",
        "labelled answers, all of which have the same label",
        "add rows with the other one: a loss over labelled answers tells good from bad ones",
    ),
    "length_bias": Kind(
        "warning",
        "comparisons, in which length nearly tells which answer is preferred",
        "balance the lengths, or use a loss that is normalised by length",
    ),
    "encoding": Kind(
        "warning",
        "rows with signs of a wrong encoding (UTF-8 read as Latin-1, U+FFFD, control characters)",
        "export them again as UTF-8",
    ),
    "margin_missing": Kind(
        "note", "pairs without a margin or scores, though others have them", "add them, if the loss is to read margins"
    ),
    "script": Kind("note", "rows in another script than most", "remove them, unless the mixture is meant"),
    "far_longer": Kind("note", "rows far longer than the rest", "look at them: are they one document each?"),
    "unread_columns": Kind("note", "rows with columns that are not read", "name them in data.columns, if they matter"),
}

BAD_ROWS = (
    "unreadable",
    "unusable",
    "unknown_role",
    "nothing_to_train",
    "lone_surrogate",
    "bos_doubled",
    "same_completions",
    "empty_side",
    "unfit",
)


@dataclass(frozen=True)
class Place:
    """A row that a finding is about; `row` is counted from 0."""

    source: str
    row: int
    detail: str = ""


@dataclass
class Finding:
    """One kind of finding: in how many rows, and the first of them."""

    kind: str
    severity: Severity
    count: int = 0
    rows: list[Place] = field(default_factory=list)
    detail: str = ""  # of all of them together

    def lines(self, shown: int = 3) -> list[str]:
        """Count and meaning, the first places, the remedy."""
        about = f" ({self.detail})" if self.detail else ""
        where = [places(self.rows[:shown]) + (", ..." if self.count > shown else "")] if self.rows else []
        return [f"{self.count:,} {KINDS[self.kind].meaning}{about}", *where, f"-> {KINDS[self.kind].remedy}"]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; rows are counted from 1, as in the text."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "count": self.count,
            "meaning": KINDS[self.kind].meaning,
            "remedy": KINDS[self.kind].remedy,
            "detail": self.detail,
            "rows": [{"source": p.source, "row": p.row + 1, "detail": p.detail} for p in self.rows],
        }


class Findings:
    """Collects findings. `severities` of this data stand in the place of the usual ones."""

    def __init__(self, severities: Mapping[str, Severity] | None = None) -> None:
        self._severities = dict(severities or {})
        self._found: dict[str, Finding] = {}

    def add(self, kind: str, source: str, row: int, detail: str = "") -> None:
        """One more row that a finding is about."""
        found = self.get(kind)
        found.count += 1
        if len(found.rows) < MAX_ROWS:
            found.rows.append(Place(source, row, detail))

    def get(self, kind: str) -> Finding:
        """The finding of a kind, begun if there is none yet."""
        severity = self._severities.get(kind, KINDS[kind].severity)
        return self._found.setdefault(kind, Finding(kind, severity))

    def all(self) -> list[Finding]:
        """What was found at all, errors first."""
        order = {kind: i for i, kind in enumerate(KINDS)}
        found = (f for f in self._found.values() if f.count)
        return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), order[f.kind]))


def places(rows: list[Place]) -> str:
    """`a.jsonl line 3 (why), line 9; b.jsonl line 1`: a file is named where it changes."""
    out, before = "", None
    for entry in rows:
        where = place(entry.source, entry.row)
        if entry.source == before:
            where = where.removeprefix(f"{entry.source} ")
        out += ("" if before is None else ", " if entry.source == before else "; ") + where
        out += f" ({entry.detail})" if entry.detail else ""
        before = entry.source
    return out
