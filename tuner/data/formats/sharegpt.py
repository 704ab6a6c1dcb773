"""ShareGPT rows, `{"conversations": [{"from", "value"}, ...], "system"?, "tools"?}` -> Example.

The shape in which the shared conversations behind Vicuna (2023) went round. A `function_call` has the JSON of
`{"name", "arguments"}`, or of a list of them, as its value, and an `observation` what the tool gave back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column, optional, shorten
from tuner.data.formats._functions import from_json, to_tool_calls, tools_of
from tuner.data.formats.messages import conversation, override
from tuner.errors import DataError
from tuner.registry import did_you_mean
from tuner.types import Example, Message

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
KEYS = ("from", "value", "train", "weight")


@FORMATS.register("sharegpt")
class ShareGpt(Format):
    """A conversation, in other words than OpenAI's."""

    kind = "chat"
    columns = ("conversations", "system", "tools")
    looks_for = "a column 'conversations' with a list of {from, value}"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "conversations" in row

    @classmethod
    def unread(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[str]:
        yield from super().unread(row, columns)
        name = columns.get("conversations", "conversations")
        turns = row.get(name)
        for entry in turns if isinstance(turns, list) else ():
            for key, value in entry.items() if isinstance(entry, Mapping) else ():
                if key not in KEYS and value is not None:
                    yield f"{name}[].{key}"

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        value, what = column(row, columns, "conversations"), columns.get("conversations", "conversations")
        if not isinstance(value, list) or not value:
            raise DataError(f"{what} is {shorten(value)}, not a list of messages")
        turns = tuple(_message(entry, f"{what}[{i}]") for i, entry in enumerate(value))
        system = optional(row, columns, "system")
        if system is not None:
            name = columns.get("system", "system")
            if turns[0].role == "system":
                raise DataError(f"{name} has a system text, and so has {what}[0]; remove one of them")
            turns = (Message("system", as_text(system, name)), *turns)
        return conversation(turns, tools_of(row, columns))


def _message(entry: Any, what: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{what} is {shorten(entry)}, not an object with from and value")
    for key in ("from", "value"):
        if key not in entry:
            keys = ", ".join(map(str, entry)) or "no keys"
            name = what.partition("[")[0]
            openai = "role" in entry and "content" in entry
            remedy = f"; messages of role and content are read by data.columns: {{messages: {name}}}" if openai else ""
            raise DataError(f"{what} has no '{key}'{did_you_mean(key, entry)}; it has {keys}{remedy}")
    role = entry["from"]
    if not isinstance(role, str) or role not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise DataError(f"{what}.from is {shorten(role)}{hint}; allowed: {', '.join(ROLES)}", kind="unknown_role")
    text = as_text(entry["value"], f"{what}.value")
    train, weight = override(entry, what)
    if role != "function_call":
        return Message(ROLES[role], text, train, weight)
    calls = from_json(text, f"{what}.value")
    calls = to_tool_calls(calls if isinstance(calls, list) else [calls], f"{what}.value")
    if not calls:
        raise DataError(f"{what}.value calls no function; write one, or remove the message")
    return Message("assistant", "", train, weight, calls)
