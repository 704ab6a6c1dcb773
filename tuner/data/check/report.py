"""What a check found -> a report: lines for people, one JSON object for machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.data.check.findings import SEVERITIES, Finding
from tuner.errors import printable

BARS = 12  # bars of a histogram at most
BAR_WIDTH = 40  # characters of the longest
SCHEMA = 1  # of the JSON object


@dataclass(frozen=True)
class Source:
    """A source as it was read."""

    path: str
    format: str
    reason: str
    rows: int

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format, "reason": self.reason, "rows": self.rows}


@dataclass(frozen=True)
class Side:
    """Train or eval, after data.overlong, weights and holding out: what the run would use."""

    sources: Sequence[Source]
    rows: int
    lengths: np.ndarray  # [samples] tokens
    trained: int
    scripts: dict[str, int]  # rows by their main script

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def quantiles(self) -> dict[str, float]:
        """Of the lengths, in tokens."""
        if not len(self.lengths):
            return {}
        found = {f"p{q}": float(np.percentile(self.lengths, q)) for q in (50, 95, 99)}
        return {
            "min": int(self.lengths.min()),
            "mean": round(float(self.lengths.mean()), 1),
            **found,
            "max": int(self.lengths.max()),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """(first length, last length, samples) of bars of one round width; the last goes on to the longest sample."""
        if not len(self.lengths):
            return []
        reach = float(np.percentile(self.lengths, 99))
        step = next(
            width for power in range(19) for width in (10**power, 2 * 10**power, 5 * 10**power) if width * BARS > reach
        )
        first = int(self.lengths.min()) // step
        bins = np.minimum(self.lengths // step - first, BARS - 1)
        counts = np.bincount(bins)
        bars = [((first + i) * step, (first + i + 1) * step - 1, int(n)) for i, n in enumerate(counts)]
        bars[-1] = (bars[-1][0], max(bars[-1][1], int(self.lengths.max())), bars[-1][2])
        return bars

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": [s.as_dict() for s in self.sources],
            "rows": self.rows,
            "samples": len(self.lengths),
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "lengths": self.quantiles(),
            "histogram": [{"from": a, "to": b, "samples": n} for a, b, n in self.histogram()],
            "scripts": self.scripts,
        }


@dataclass(frozen=True)
class Steps:
    """What training would do with the data, as its plan has it."""

    steps: int
    steps_per_epoch: int
    epochs: float
    batch: str  # such as `64 examples`
    tokens_per_epoch: int
    microbatches_per_epoch: int
    microbatch_tokens: int
    packing: bool
    efficiency: float  # tokens out of the room that the microbatches of an epoch have

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "batch": self.batch,
            "tokens_per_epoch": self.tokens_per_epoch,
            "microbatches_per_epoch": self.microbatches_per_epoch,
            "microbatch_tokens": self.microbatch_tokens,
            "packing": self.packing,
            "packing_efficiency": round(self.efficiency, 4),
        }


@dataclass(frozen=True)
class LengthBias:
    """How well length alone tells the preferred answer from the other one."""

    comparisons: int
    accuracy: float  # of "the longer one is preferred", ties count half
    mean_preferred: float  # tokens
    mean_other: float
    error: float  # standard error of the accuracy if length told nothing

    @classmethod
    def of_pairs(cls, preferred: np.ndarray, other: np.ndarray) -> LengthBias:
        """From the tokens of both answers of each comparison: [comparisons] each."""
        n = len(preferred)
        wins = float(np.mean((preferred > other) + 0.5 * (preferred == other)))
        return cls(n, wins, float(preferred.mean()), float(other.mean()), 0.5 / n**0.5)

    @classmethod
    def of_unpaired(cls, good: np.ndarray, bad: np.ndarray) -> LengthBias:
        """From the tokens of good and of bad answers, every good one against every bad one.

        The error is that of the statistic of Mann and Whitney (1947).
        """
        order, n = np.sort(bad), len(good) * len(bad)
        below, upto = np.searchsorted(order, good, "left"), np.searchsorted(order, good, "right")
        error = ((len(good) + len(bad) + 1) / (12 * n)) ** 0.5
        return cls(n, float((below + upto).sum() / 2 / n), float(good.mean()), float(bad.mean()), error)

    @property
    def far(self) -> bool:
        """Ten points or more from chance, and more than three standard errors."""
        return abs(self.accuracy - 0.5) >= 0.1 and abs(self.accuracy - 0.5) > 3 * self.error

    def as_dict(self) -> dict[str, Any]:
        return {
            "comparisons": self.comparisons,
            "longer_wins": round(self.accuracy, 4),
            "mean_preferred_tokens": round(self.mean_preferred, 1),
            "mean_other_tokens": round(self.mean_other, 1),
        }


@dataclass(frozen=True)
class CheckReport:
    """All that `tuner data check` says.

    As JSON: `schema`, `clean` (no error, no warning), `counts` (findings by severity), `template`, `train_on`,
    `findings` (each `kind`, `severity`, `count`, `meaning`, `remedy`, `detail` and the first `rows`, counted from 1),
    `train`, `eval` (null without one), `plan` (null where nothing is left to train on), `preferences` (null without).
    """

    findings: Sequence[Finding]
    train: Side
    eval: Side | None
    steps: Steps | None
    bias: LengthBias | None
    template: str
    train_on: str

    def number(self, severity: str) -> int:
        """How many findings are of this severity."""
        return sum(f.severity == severity for f in self.findings)

    @property
    def clean(self) -> bool:
        return not self.number("error") and not self.number("warning")

    def verdict(self) -> str:
        """`2 errors, 1 warning`, or `nothing wrong`."""
        found = [(self.number(s), s) for s in SEVERITIES]
        return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in found if n) or "nothing wrong"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "clean": self.clean,
            "counts": {severity: self.number(severity) for severity in SEVERITIES},
            "template": self.template,
            "train_on": self.train_on,
            "findings": [f.as_dict() for f in self.findings],
            "train": self.train.as_dict(),
            "eval": self.eval.as_dict() if self.eval else None,
            "plan": self.steps.as_dict() if self.steps else None,
            "preferences": self.bias.as_dict() if self.bias else None,
        }

    def lines(self) -> list[str]:
        """The report for people."""
        blocks = [
            ("train", _side_lines(self.train)),
            *([("eval", _side_lines(self.eval))] if self.eval else []),
            ("template", [f"{self.template}; trained: {self.train_on}"]),
            ("", [""]),
            ("found", [self.verdict()]),
            *((f.severity, f.lines()) for f in self.findings),
            ("", [""]),
            ("lengths", _length_lines(self.train)),
        ]
        if self.bias:
            b = self.bias
            said = f"the longer answer is preferred in {100 * b.accuracy:.1f}% of {b.comparisons:,} comparisons"
            means = f"mean tokens: preferred {b.mean_preferred:.1f}, other {b.mean_other:.1f}"
            blocks.append(("pairs", [f"{said}; {means}"]))
        if self.steps:
            blocks.append(("plan", _step_lines(self.steps)))
        here = f"{os.getcwd()}{os.sep}"
        rows = ((label if i == 0 else "", line) for label, lines in blocks for i, line in enumerate(lines))
        return [f"{label:<9}{printable(line.replace(here, ''))}".rstrip() for label, line in rows]


def _side_lines(side: Side) -> list[str]:
    share = 100 * side.trained / side.tokens if side.tokens else 0.0
    scripts = ", ".join(f"{name} {n:,}" for name, n in side.scripts.items())
    return [
        *(f"{s.path}: {s.format} ({s.reason})" for s in side.sources),
        f"{side.rows:,} rows, {len(side.lengths):,} samples",
        f"{side.tokens:,} tokens, {side.trained:,} of them trained ({share:.1f}%)",
        *([f"rows by script: {scripts}"] if len(side.scripts) > 1 else []),
    ]


def _length_lines(side: Side) -> list[str]:
    found = side.quantiles()
    if not found:
        return ["there are no samples"]
    bars = side.histogram()
    most = max(n for _, _, n in bars)
    labels = [f"{a:,}-{b:,}" for a, b, _ in bars]
    width = max(map(len, labels))
    return [
        f"tokens of a training sample: {found['min']:,} to {found['max']:,}, mean {found['mean']:,.1f}, "
        f"median {found['p50']:,.0f}, 95% up to {found['p95']:,.0f}, 99% up to {found['p99']:,.0f}",
        *(
            f"{label:>{width}}  {'#' * max(round(BAR_WIDTH * n / most), 1 if n else 0):<{BAR_WIDTH}}  {n:,}"
            for label, (_, _, n) in zip(labels, bars, strict=True)
        ),
    ]


def _step_lines(steps: Steps) -> list[str]:
    how = "packed" if steps.packing else "one sample each, data.packing: false"
    return [
        f"{steps.steps:,} steps of {steps.batch} ({steps.epochs:.4g} epochs of {steps.steps_per_epoch:,} steps)",
        f"{steps.tokens_per_epoch:,} tokens an epoch in {steps.microbatches_per_epoch:,} microbatches of up to "
        f"{steps.microbatch_tokens:,} ({how}), {100 * steps.efficiency:.1f}% full",
    ]
