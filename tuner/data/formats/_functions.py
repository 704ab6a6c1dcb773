"""The JSON of functions in a row -> tools and tool calls, with the keys, the order and the nulls of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tuner.data.formats import ArrowRow, as_text, optional, shorten
from tuner.errors import DataError
from tuner.types import ToolCall


def tools_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    """The JSON schemas in the column `tools`: a list of them, of strings that hold one, or a string that holds the
    list. Empty where the row has none.

    Raises:
        DataError: no such list, or a schema without a name; names the place in the row.
    """
    what = columns.get("tools", "tools")
    value = optional(row, columns, "tools")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = from_json(value, what) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DataError(f"{what} is {shorten(value)}, not a list of function schemas")
    return tuple(_tool(entry, f"{what}[{i}]", isinstance(row, ArrowRow)) for i, entry in enumerate(tools))


def to_tool_calls(value: Any, what: str, arrow: bool = False) -> tuple[ToolCall, ...]:
    """OpenAI's `tool_calls`, `[{"id"?, "type": "function", "function": {"name", "arguments"}}]`, or functions alone.

    `arguments` is an object, or a string that holds one. `arrow` says that the row is Arrow's (see `ArrowRow`).

    Raises:
        DataError: names the place in the row.
    """
    if not isinstance(value, list):
        raise DataError(f"{what} is {shorten(value)}, not a list of calls")
    return tuple(_tool_call(entry, f"{what}[{i}]", arrow) for i, entry in enumerate(value))


def from_json(text: str, what: str) -> Any:
    """The value that a string of JSON holds; a DataError for what is no JSON, and for a key twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{what} has the key {shorten(twice)} twice in one object; remove one of them")
        return out

    def constant(name: str) -> Any:
        raise DataError(f"{what} holds {name}, which is no JSON; write a number, a string or null")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is {shorten(text)}, which is no JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is {shorten(text)}, which cannot be read as JSON: {error}") from None


def _tool(entry: Any, what: str, arrow: bool) -> Mapping[str, Any]:
    if isinstance(entry, str):
        entry, arrow = from_json(entry, what), False
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f'{what} is {shorten(entry)}, not the schema of a function: {{"type": "function", "function": {{"name", '
            '"description", "parameters"}}'
        )
    _check_json(entry, what, arrow)
    return entry


def _tool_call(entry: Any, what: str, arrow: bool) -> ToolCall:
    function = entry
    if isinstance(entry, Mapping):
        if entry.get("type") not in (None, "function"):
            raise DataError(f"{what}.type is {shorten(entry['type'])}; only calls of a 'function' can be read")
        if entry.get("function") is not None:
            function, what = entry["function"], f"{what}.function"
    if not isinstance(function, Mapping):
        raise DataError(f"{what} is {shorten(function)}, not an object with name and arguments")
    for key in ("name", "arguments"):
        if key not in function:
            raise DataError(f"{what} has no '{key}'; it has {', '.join(map(str, function)) or 'no keys'}")
    name = as_text(function["name"], f"{what}.name")
    if not name:
        raise DataError(f"{what}.name is empty; name the function")
    call_id = entry.get("id")
    return ToolCall(
        name,
        _arguments(function["arguments"], f"{what}.arguments", arrow),
        None if call_id is None else as_text(call_id, f"{what.removesuffix('.function')}.id"),
    )


def _arguments(value: Any, what: str, arrow: bool) -> Mapping[str, Any]:
    arguments = value
    if isinstance(value, str) and value.strip():
        arguments, arrow = from_json(value, what), False
    if not isinstance(arguments, Mapping):
        raise DataError(f"{what} is {shorten(value)}, not a JSON object; write {{}} for a call without arguments")
    _check_json(arguments, what, arrow)
    return arguments


def _check_json(value: Any, what: str, arrow: bool) -> None:
    """Refuses what JSON cannot hold, and an Arrow object with a null that may not be the row's own."""
    if arrow and _has_null(value):
        raise DataError(
            f"{what} holds a null, and columns of parquet and Arrow give every object the keys of all rows with null "
            "for those that it does not have; store it as a string of JSON there, or use JSON Lines"
        )
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half of a surrogate pair; replace it in the file") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{what} holds what JSON has no place for: {error}") from None


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(_has_null, value)))
