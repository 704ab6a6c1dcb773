"""Rows with a chosen and a rejected answer, `{"prompt"?, "chosen", "rejected"}`, strings or messages -> Example.

With a prompt, chosen and rejected are its two completions. Without, or where they repeat it, they are whole
conversations: what they share is the prompt. Optional: `margin`, or `score_chosen` and `score_rejected`, and `tools`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, ArrowRow, as_number, column, optional
from tuner.data.formats._functions import tools_of
from tuner.data.formats._pairs import Turns, divide, same
from tuner.data.formats.hh import HH
from tuner.data.formats.messages import TurnsFormat, answer_turns, completion_turns, prompt_turns
from tuner.errors import DataError
from tuner.types import Example

SIDES = ("chosen", "rejected")


@FORMATS.register("preference")
class Preference(TurnsFormat):
    """Two completions, the chosen one first. The margin is that of its column, or chosen score minus rejected score."""

    kind = "preference"
    columns = ("prompt", *SIDES, "tools", "margin", "score_chosen", "score_rejected")
    turns = ("prompt", *SIDES)
    looks_for = "columns 'chosen' and 'rejected'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "chosen" in row and "rejected" in row and not HH.detect(row)

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        names = [columns.get(side, side) for side in SIDES]
        values = [column(row, columns, side) for side in SIDES]
        arrow = isinstance(row, ArrowRow)
        if optional(row, columns, "prompt") is not None:
            prompt, completions = _with_prompt(row, columns, values, names)
        else:
            for value, name in zip(values, names, strict=True):
                if isinstance(value, str):
                    raise DataError(
                        f"{name} is a string, and there is no prompt that it answers; add a column 'prompt', or name "
                        "it (data.columns: {prompt: ...})"
                    )
            chosen, rejected = (completion_turns(v, n, arrow) for v, n in zip(values, names, strict=True))
            prompt, completions = divide(chosen, rejected, names)
        scores = _scores(row, columns)
        margin = optional(row, columns, "margin")
        if margin is not None:
            margin = as_number(margin, columns.get("margin", "margin"))
        elif scores:
            margin = scores[0] - scores[1]
        return Example(prompt, completions, tools=tools_of(row, columns), margin=margin, scores=scores)


def _with_prompt(
    row: Mapping[str, Any], columns: Mapping[str, str], values: list[Any], names: list[str]
) -> tuple[Turns, tuple[Turns, ...]]:
    """The prompt and the completions; of conversations that are whole the prompt is checked against what they share."""
    prompt, what = prompt_turns(row, columns), columns.get("prompt", "prompt")
    arrow = isinstance(row, ArrowRow)
    chosen, rejected = (completion_turns(v, n, arrow) for v, n in zip(values, names, strict=True))
    if chosen[0].role == "assistant" or rejected[0].role == "assistant":
        return prompt, tuple(answer_turns(v, n, arrow) for v, n in zip(values, names, strict=True))
    shared, completions = divide(chosen, rejected, names)
    size = len(prompt)
    if not any(len(part) == size and all(map(same, part, prompt)) for part in (shared[:size], shared[-size:])):
        raise DataError(
            f"{what} is neither how {names[0]} and {names[1]} begin nor what they answer, though they are whole "
            "conversations; mend the row, or remove it"
        )
    return shared, completions


def _scores(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[float, float] | None:
    names = [columns.get(name, name) for name in ("score_chosen", "score_rejected")]
    given = [optional(row, columns, name) for name in ("score_chosen", "score_rejected")]
    if given == [None, None]:
        return None
    for one, other, value in zip(names, names[::-1], given, strict=True):
        if value is None:
            raise DataError(f"there is a {other} and no {one}; give both scores, or none")
    return as_number(given[0], names[0]), as_number(given[1], names[1])
