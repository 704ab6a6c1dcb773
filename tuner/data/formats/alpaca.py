"""Alpaca rows, `{"instruction", "input"?, "output", "system"?, "history"?}` -> Example.

The first three keys are those of Stanford Alpaca's data (Taori et al. 2023); `system` and `history`, pairs of earlier
instructions and outputs, are a widespread addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column, optional, shorten
from tuner.data.formats.messages import conversation
from tuner.errors import DataError
from tuner.types import Example, Message


@FORMATS.register("alpaca")
class Alpaca(Format):
    """The instruction is a user turn; an input that is not empty follows it in a message of its own, whose role is
    `input`. The outputs of the history are answers like the last one, and the masking policy decides about them."""

    kind = "chat"
    columns = ("instruction", "input", "output", "system", "history")
    looks_for = "columns 'instruction' and 'output'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "instruction" in row and "output" in row

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        name = {key: columns.get(key, key) for key in Alpaca.columns}
        instruction, output = (as_text(column(row, columns, key), name[key]) for key in ("instruction", "output"))
        if not instruction.strip():
            raise DataError(f"{name['instruction']} is empty; write what is to be done, or remove the row")
        turns = []
        if (system := optional(row, columns, "system")) is not None:
            turns.append(Message("system", as_text(system, name["system"])))
        turns += _history(optional(row, columns, "history"), name["history"])
        turns.append(Message("user", instruction))
        if (about := optional(row, columns, "input")) is not None:
            turns.append(Message("input", as_text(about, name["input"])))
        return conversation((*turns, Message("assistant", output)))


def _history(value: Any, what: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{what} is {shorten(value)}, not a list of pairs [instruction, output]")
    turns = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{what}[{i}] is {shorten(pair)}, not a pair [instruction, output]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, as_text(text, f"{what}[{i}]")))
    return turns
