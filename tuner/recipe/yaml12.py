"""YAML 1.2 text -> plain values that remember the line they stand on.

Only the core schema of YAML 1.2: `1e-4` is a number, `no` and `1:30` are text, a key given twice is an error, and tags
are refused, so that nothing in a file can name a Python object. Built from the parser's events, without recursion:
aliases are allowed, and what they expand to is counted before it exists.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from tuner.errors import RecipeError

MAX_NODES = 10_000  # after aliases are expanded
MAX_DEPTH = 16

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_LONGEST_NUMBER = 100  # characters; a longer run of digits is no setting, and int() is quadratic in it


@dataclass(frozen=True)
class Node:
    """A scalar, a mapping or a list, with the place (`file:line` or the override) and the 1-based line of its key."""

    value: str | int | float | bool | None | dict[str, Node] | list[Node]
    place: str
    line: int
    size: int = 1  # nodes in it, aliases expanded

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def scalar(text: str) -> str | int | float | bool | None:
    """An unquoted scalar by the core schema of YAML 1.2 (section 10.3.2)."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF.fullmatch(text):
        return float(text.replace(".", ""))
    return float("nan") if text in (".nan", ".NaN", ".NAN") else text


@dataclass
class _Open:
    """A mapping or list whose end has not been seen."""

    value: dict[str, Node] | list[Node]
    line: int
    anchor: str | None
    size: int = 1
    key: str | None = None  # of a mapping: the key that waits for its value
    key_line: int = 0


class _Builder:
    def __init__(self, name: str, numbered: bool) -> None:
        self.name, self.numbered = name, numbered
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.root: Node | None = None

    def place(self, line: int) -> str:
        return f"{self.name}:{line}" if self.numbered else self.name

    def refuse(self, line: int, message: str) -> RecipeError:
        return RecipeError(f"{self.place(line)}: {message}")

    def feed(self, event: Event) -> None:
        line = event.start_mark.line + 1
        tag = getattr(event, "tag", None)  # the parser's own classes: only some events carry a tag
        if tag is not None and str(tag) != "!":
            raise self.refuse(line, f"YAML tags such as {str(tag)[:40]!r} are not allowed in a recipe; remove it")
        if isinstance(event, DocumentStartEvent) and self.root is not None:
            raise self.refuse(line, "a recipe is one YAML document, and a second one begins here; remove it")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self.refuse(line, f"alias '*{event.anchor}' names no finished anchor")
            self.add(self.anchors[event.anchor], line)
        elif isinstance(event, ScalarEvent):
            plain = not event.style
            node = Node(scalar(event.value) if plain else event.value, self.place(line), line)
            top = self.stack[-1] if self.stack else None
            if top is not None and isinstance(top.value, dict) and top.key is None:
                self.open_key(top, event.value, line)
            else:
                self.add(node, line, event.anchor)
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            if len(self.stack) >= MAX_DEPTH:
                raise self.refuse(line, f"nested more than {MAX_DEPTH} deep")
            self.stack.append(_Open({} if isinstance(event, MappingStartEvent) else [], line, event.anchor))
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            done = self.stack.pop()
            self.add(Node(done.value, self.place(done.line), done.line, done.size), done.line, done.anchor)

    def open_key(self, top: _Open, key: str, line: int) -> None:
        assert isinstance(top.value, dict)
        if key in top.value:
            raise self.refuse(line, f"key '{key}' is given twice (first on line {top.value[key].line}); keep one")
        top.key, top.key_line = key, line

    def add(self, node: Node, line: int, anchor: str | None = None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        top.size += node.size
        if sum(level.size for level in self.stack) > MAX_NODES:
            raise self.refuse(line, f"expands to more than {MAX_NODES:,} values")
        if isinstance(top.value, list):
            top.value.append(dataclasses.replace(node, place=self.place(line), line=line))
        elif top.key is None:
            raise self.refuse(line, "a key must be a plain word, not a list, a mapping or an alias")
        else:
            place = self.place(top.key_line)
            top.value[top.key] = dataclasses.replace(node, place=place, line=top.key_line)
            top.key = None


def parse(text: str, name: str, *, numbered: bool = True) -> Node | None:
    """The one document in `text` (None if there is none); `name` is the file, or with `numbered=False` the whole place.

    Raises RecipeError with the line for bad syntax, a duplicate key, a tag, a second document, or a bomb.
    """
    builder = _Builder(name, numbered)
    try:
        for event in _events(text):
            builder.feed(event)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise builder.refuse(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem}") from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise builder.refuse(1, f"not valid YAML: {str(error).splitlines()[0]}") from None
    return builder.root


def _events(text: str) -> Iterator[Event]:
    return iter(YAML(typ="safe", pure=True).parse(text))
