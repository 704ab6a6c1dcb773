"""OpenAI chat rows, `{"messages": [{"role", "content", ...}, ...], "tools"?: [...]}` -> Example.

The shape is that of OpenAI's Chat Completions API. Beside `role` and `content`, an assistant message may have
`tool_calls`, a tool message has `tool_call_id` and `name`, and any may have `train` and `weight`, which are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tuner.data.formats import FORMATS, ArrowRow, Format, as_text, column, shorten
from tuner.data.formats._functions import to_tool_calls, tools_of
from tuner.errors import DataError
from tuner.registry import did_you_mean
from tuner.types import Example, Message

# OpenAI: "developer" replaces "system" for its newer models; both carry instructions that stand above the user's
ROLES = {r: r for r in ("system", "user", "assistant", "tool")} | {"developer": "system"}

_Keys = Mapping[str, Any]  # the keys that are read, each with those inside of it
_FUNCTION: _Keys = {"name": {}, "arguments": {}}
_TURN: _Keys = {
    "role": {},
    "content": {"type": {}, "text": {}},
    "train": {},
    "weight": {},
    "tool_calls": {"id": {}, "type": {}, "function": _FUNCTION, **_FUNCTION},
}
_TOOL_TURN: _Keys = {**_TURN, "tool_call_id": {}, "name": {}}


class TurnsFormat(Format):
    """A format with columns that hold messages; keys in there that are not read are counted too."""

    turns: ClassVar[tuple[str, ...]]  # those columns

    @classmethod
    def unread(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[str]:
        yield from super().unread(row, columns)
        for name in (columns.get(turn, turn) for turn in cls.turns):
            yield from _unread_keys(row.get(name), name)


@FORMATS.register("messages")
class Messages(TurnsFormat):
    """A conversation. What comes before the first assistant turn is the prompt, the rest is the one completion."""

    kind = "chat"
    columns = ("messages", "tools")
    turns = ("messages",)
    looks_for = "a column 'messages' with a list of {role, content}"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "messages" in row

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        what = columns.get("messages", "messages")
        turns = to_messages(column(row, columns, "messages"), what, isinstance(row, ArrowRow))
        return conversation(turns, tools_of(row, columns))


def conversation(turns: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...] = ()) -> Example:
    """The example of a whole chat; a DataError if nobody answers in it."""
    first = next((i for i, m in enumerate(turns) if m.role == "assistant"), None)
    if first is None:
        raise DataError(
            "the conversation has no assistant turn, so nothing to train on; add one or remove the row",
            kind="nothing_to_train",
        )
    return Example(prompt=turns[:first], completions=(turns[first:],), tools=tools)


def to_messages(value: Any, what: str, arrow: bool = False) -> tuple[Message, ...]:
    """A list of OpenAI messages; `what` is its name in error messages, `arrow` says that the row is an `ArrowRow`.

    Raises:
        DataError: names the message and the key.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} is {shorten(value)}, not a list of messages")
    return tuple(_message(entry, f"{what}[{i}]", arrow) for i, entry in enumerate(value))


def prompt_turns(row: Mapping[str, Any], columns: Mapping[str, str], name: str = "prompt") -> tuple[Message, ...]:
    """The messages in a column; a string is one user turn."""
    return _turns(column(row, columns, name), columns.get(name, name), "user", isinstance(row, ArrowRow))


def completion_turns(value: Any, what: str, arrow: bool) -> tuple[Message, ...]:
    """The messages of a completion; a string is one assistant turn. A DataError if nobody answers in them."""
    turns = _turns(value, what, "assistant", arrow)
    if not any(m.role == "assistant" for m in turns):
        raise DataError(
            f"{what} has no assistant turn, so nothing to train on; add one or remove the row", kind="nothing_to_train"
        )
    return turns


def answer_turns(value: Any, what: str, arrow: bool) -> tuple[Message, ...]:
    """The same of a completion that is judged: it begins with the answer to its prompt."""
    turns = completion_turns(value, what, arrow)
    if turns[0].role != "assistant":
        raise DataError(
            f"{what} begins with a {turns[0].role} turn, not with an answer; put what comes before it into the prompt"
        )
    return turns


def override(entry: Mapping[str, Any], what: str) -> tuple[bool | None, float]:
    """The `train` and the `weight` of a message; null is as good as absent, since parquet has it in its place."""
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{what}.train is {shorten(train)}; write true or false")
    if weight is None:
        return train, 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise DataError(f"{what}.weight is {shorten(weight)}; write a number of at least 0")
    return train, float(weight)


def _turns(value: Any, what: str, role: str, arrow: bool) -> tuple[Message, ...]:
    return to_messages(value, what, arrow) if isinstance(value, list) else (Message(role, as_text(value, what)),)


def _message(entry: Any, what: str, arrow: bool) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{what} is {shorten(entry)}, not an object with role and content")
    calls = entry.get("tool_calls") or None  # an empty list is what some writers put for none
    for key in ("role",) if calls else ("role", "content"):
        if key not in entry:
            keys = ", ".join(map(str, entry)) or "no keys"
            raise DataError(f"{what} has no '{key}'{did_you_mean(key, entry)}; it has {keys}")
    if entry.get("function_call"):
        raise DataError(f"{what} has 'function_call', which OpenAI has given up; write it as 'tool_calls'")
    role = entry["role"]
    if not isinstance(role, str) or role not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise DataError(f"{what}.role is {shorten(role)}{hint}; allowed: {', '.join(ROLES)}", kind="unknown_role")
    if calls and role != "assistant":
        raise DataError(f"{what} has 'tool_calls' in a {role} turn; only the assistant calls tools")
    name, call_id = (
        as_text(entry[key], f"{what}.{key}") if role == "tool" and entry.get(key) is not None else None
        for key in ("name", "tool_call_id")
    )
    content = entry.get("content")
    train, weight = override(entry, what)
    return Message(
        ROLES[role],
        "" if calls and content is None else _content(content, f"{what}.content"),
        train,
        weight,
        to_tool_calls(calls, f"{what}.tool_calls", arrow) if calls else (),
        name,
        call_id,
    )


def _content(value: Any, what: str) -> str:
    """A text, or the texts of a list of parts with nothing between them."""
    if not isinstance(value, list) or not value:
        return as_text(value, what)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or "type" not in part:
            raise DataError(f"{what}[{i}] is {shorten(part)}, not a part {{type: text, text}}")
        if part["type"] != "text":
            raise DataError(f"{what}[{i}].type is {shorten(part['type'])}; only parts of type 'text' can be read")
        texts.append(as_text(part.get("text"), f"{what}[{i}].text"))
    return "".join(texts)


def _unread_keys(value: Any, what: str) -> Iterator[str]:
    """`messages[].audio` and the like; a null is no key."""
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, list):  # a completion of a ranked list
            yield from _unread_keys(entry, f"{what}[]")
        elif isinstance(entry, Mapping):
            yield from _unread(entry, _TOOL_TURN if entry.get("role") == "tool" else _TURN, f"{what}[]")


def _unread(entry: Mapping[str, Any], read: _Keys, what: str) -> Iterator[str]:
    for key, value in entry.items():
        if value is None:
            continue
        if key not in read:
            yield f"{what}.{key}"
        elif read[key]:
            inner = value if isinstance(value, list) else [value]
            of = f"{what}.{key}[]" if isinstance(value, list) else f"{what}.{key}"
            for part in inner:
                if isinstance(part, Mapping):
                    yield from _unread(part, read[key], of)
