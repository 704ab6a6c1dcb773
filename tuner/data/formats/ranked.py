"""`{"prompt", "completions": [...]}` rows, the best completion first or with `scores` or `ranks` -> Example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, ArrowRow, as_number, column, optional, shorten
from tuner.data.formats._functions import tools_of
from tuner.data.formats.messages import TurnsFormat, answer_turns, prompt_turns
from tuner.errors import DataError
from tuner.types import Example


@FORMATS.register("ranked")
class Ranked(TurnsFormat):
    """At least two completions, put in order: the highest score first, or the lowest rank. Equal scores keep the order
    of the file; ranks leave no two completions equal."""

    kind = "preference"
    columns = ("prompt", "completions", "scores", "ranks", "tools")
    turns = ("prompt", "completions")
    looks_for = "columns 'prompt' and 'completions'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "prompt" in row and "completions" in row

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        value, what = column(row, columns, "completions"), columns.get("completions", "completions")
        if not isinstance(value, list) or len(value) < 2:
            raise DataError(f"{what} is {shorten(value)}, not a list of at least two completions")
        arrow = isinstance(row, ArrowRow)
        completions = [answer_turns(entry, f"{what}[{i}]", arrow) for i, entry in enumerate(value)]
        scores, ranks = (_numbers(row, columns, name, len(value)) for name in ("scores", "ranks"))
        if scores and ranks:
            raise DataError("there are scores and ranks; leave one of them out")
        if ranks and len(set(ranks)) < len(ranks):
            name = columns.get("ranks", "ranks")
            raise DataError(f"{name} is {shorten(row[name])}, with two completions of one rank; give scores instead")
        order = sorted(range(len(value)), key=lambda i: -scores[i] if scores else ranks[i] if ranks else i)
        return Example(
            prompt_turns(row, columns),
            tuple(completions[i] for i in order),
            tools=tools_of(row, columns),
            scores=tuple(scores[i] for i in order) if scores else None,
            order=tuple(order),
        )


def _numbers(row: Mapping[str, Any], columns: Mapping[str, str], name: str, size: int) -> list[float] | None:
    """The numbers of a column, one for each completion; None where the row has none."""
    value, what = optional(row, columns, name), columns.get(name, name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != size:
        raise DataError(f"{what} is {shorten(value)}, not a list of {size} numbers, one for each completion")
    return [as_number(entry, f"{what}[{i}]") for i, entry in enumerate(value)]
