"""`{"prompt", "completion"}` rows, each a string or a list of messages -> Example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, ArrowRow, column
from tuner.data.formats._functions import tools_of
from tuner.data.formats.messages import TurnsFormat, completion_turns, prompt_turns
from tuner.data.formats.unpaired import Unpaired
from tuner.types import Example


@FORMATS.register("prompt_completion")
class PromptCompletion(TurnsFormat):
    """A string prompt is one user turn, a string completion one assistant turn. Turns of the prompt are never trained
    unless they say `train: true`."""

    kind = "chat"
    columns = ("prompt", "completion", "tools")
    turns = ("prompt", "completion")
    looks_for = "columns 'prompt' and 'completion'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "prompt" in row and "completion" in row and not Unpaired.detect(row)

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        value, what = column(row, columns, "completion"), columns.get("completion", "completion")
        completion = completion_turns(value, what, isinstance(row, ArrowRow))
        return Example(prompt_turns(row, columns), (completion,), tools=tools_of(row, columns))
