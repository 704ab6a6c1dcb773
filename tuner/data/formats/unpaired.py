"""`{"prompt", "completion", "label": true}` rows, one judged completion each -> Example.

The data of KTO (Ethayarajh et al. 2024, arXiv 2402.01306): the label says whether the completion is a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, ArrowRow, column, shorten
from tuner.data.formats._functions import tools_of
from tuner.data.formats.messages import TurnsFormat, answer_turns, prompt_turns
from tuner.errors import DataError
from tuner.types import Example


@FORMATS.register("unpaired")
class Unpaired(TurnsFormat):
    """A completion with its label: true or false, or 1 or 0."""

    kind = "preference"
    columns = ("prompt", "completion", "label", "tools")
    turns = ("prompt", "completion")
    looks_for = "columns 'prompt', 'completion' and 'label' (true or false)"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        has_all = "prompt" in row and "completion" in row and "label" in row
        return has_all and (row["label"] is None or _label(row["label"]) is not None)

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        value, what = column(row, columns, "completion"), columns.get("completion", "completion")
        given = column(row, columns, "label")
        label = _label(given)
        if label is None:
            raise DataError(
                f"{columns.get('label', 'label')} is {shorten(given)}; write true or false (or 1 or 0), or set "
                "data.format: prompt_completion if it does not judge the completion"
            )
        completion = answer_turns(value, what, isinstance(row, ArrowRow))
        return Example(prompt_turns(row, columns), (completion,), tools=tools_of(row, columns), label=label)


def _label(value: Any) -> bool | None:
    """The label that a value stands for; CSV has text only, so that `true` and `1` may be strings."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None
