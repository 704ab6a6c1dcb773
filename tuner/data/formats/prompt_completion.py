"""`{"prompt", "completion"}` rows, each a string or a list of messages -> Example."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column
from tuner.data.formats.messages import to_messages
from tuner.errors import DataError
from tuner.types import Example, Message


@FORMATS.register("prompt_completion")
class PromptCompletion(Format):
    """A string prompt is one user turn, a string completion one assistant turn. Turns of the prompt are never trained
    unless they say `train: true`."""

    columns = ("prompt", "completion")
    looks_for = "columns 'prompt' and 'completion'"

    @staticmethod
    def detect(keys: Collection[str]) -> bool:
        return "prompt" in keys and "completion" in keys

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        completion = _turns(row, columns, "completion", "assistant")
        if not any(m.role == "assistant" for m in completion):
            name = columns.get("completion", "completion")
            raise DataError(f"{name} has no assistant turn, so nothing to train on; add one or remove the row")
        return Example(prompt=_turns(row, columns, "prompt", "user"), completions=(completion,))


def _turns(row: Mapping[str, Any], columns: Mapping[str, str], name: str, role: str) -> tuple[Message, ...]:
    value, what = column(row, columns, name), columns.get(name, name)
    return to_messages(value, what) if isinstance(value, list) else (Message(role, as_text(value, what)),)
