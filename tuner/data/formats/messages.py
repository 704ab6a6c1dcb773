"""OpenAI chat rows, `{"messages": [{"role", "content", train?, weight?}, ...]}` -> Example."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column, shorten
from tuner.errors import DataError
from tuner.registry import did_you_mean
from tuner.types import Example, Message

ROLES = ("system", "user", "assistant")


@FORMATS.register("messages")
class Messages(Format):
    """A conversation. What comes before the first assistant turn is the prompt, the rest is the one completion."""

    columns = ("messages",)
    looks_for = "a column 'messages' with a list of {role, content}"

    @staticmethod
    def detect(keys: Collection[str]) -> bool:
        return "messages" in keys

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        turns = to_messages(column(row, columns, "messages"), columns.get("messages", "messages"))
        first = next((i for i, m in enumerate(turns) if m.role == "assistant"), None)
        if first is None:
            raise DataError("the conversation has no assistant turn, so nothing to train on; add one or remove the row")
        return Example(prompt=turns[:first], completions=(turns[first:],))


def to_messages(value: Any, what: str) -> tuple[Message, ...]:
    """A list of OpenAI messages; `what` is its name in error messages."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} is {shorten(value)}, not a list of messages")
    return tuple(_message(entry, f"{what}[{i}]") for i, entry in enumerate(value))


def _message(entry: Any, what: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{what} is {shorten(entry)}, not an object with role and content")
    for key in ("role", "content"):
        if key not in entry:
            keys = ", ".join(map(str, entry)) or "no keys"
            raise DataError(f"{what} has no '{key}'{did_you_mean(key, entry)}; it has {keys}")
    for key in ("tool_calls", "function_call"):
        if entry.get(key):
            raise DataError(
                f"{what} has '{key}', which cannot be rendered yet; remove the row, or write the call as text"
            )
    role = entry["role"]
    if role not in ROLES:
        raise DataError(f"{what}.role is {shorten(role)}{did_you_mean(role, ROLES)}; allowed: {', '.join(ROLES)}")
    train, weight = _override(entry, what)
    return Message(role, as_text(entry["content"], f"{what}.content"), train, weight)


def _override(entry: Mapping[str, Any], what: str) -> tuple[bool | None, float]:
    # parquet fills absent keys with null, so null means absent
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{what}.train is {shorten(train)}; write true or false")
    if weight is None:
        return train, 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise DataError(f"{what}.weight is {shorten(weight)}; write a number of at least 0")
    return train, float(weight)
