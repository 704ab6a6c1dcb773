"""Anthropic's HH rows, `{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}` -> Example.

The format of hh-rlhf (Bai et al. 2022, arXiv 2204.05862): a whole dialogue in one text. Some copies have the shared
beginning in a column of its own, `prompt`, and chosen and rejected only continue it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column, optional, shorten
from tuner.data.formats._pairs import divide
from tuner.errors import DataError
from tuner.types import Example, Message

ROLES = {"Human": "user", "Assistant": "assistant"}
_MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@FORMATS.register("hh")
class HH(Format):
    """Every `Human:` or `Assistant:` at the beginning of a paragraph begins a turn, also where two of the same follow
    each other and where nothing stands after it; a text does not say whether somebody only wrote the word."""

    kind = "preference"
    columns = ("prompt", "chosen", "rejected")
    looks_for = "columns 'chosen' and 'rejected' of text that begins with '\\n\\nHuman:'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
            return False
        begin = row.get("prompt") or row["chosen"]
        return isinstance(begin, str) and _MARK.match(begin) is not None

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        given, what = optional(row, columns, "prompt"), columns.get("prompt", "prompt")
        prompt = "" if given is None else as_text(given, what)
        names = [columns.get(name, name) for name in ("chosen", "rejected")]
        texts = [as_text(column(row, columns, name), columns.get(name, name)) for name in ("chosen", "rejected")]
        chosen, rejected = (
            _dialogue(prompt + text, f"{what} and {name}" if prompt else name)
            for text, name in zip(texts, names, strict=True)
        )
        shared, completions = divide(chosen, rejected, names)
        return Example(shared, completions)


def _dialogue(text: str, what: str) -> tuple[Message, ...]:
    """The turns of a text: what follows a mark and one blank, to the next mark, as it is."""
    marks = list(_MARK.finditer(text))
    if not marks or marks[0].start():
        raise DataError(f"{what} begins with {shorten(text[:40])}, not with '\\n\\nHuman:' or '\\n\\nAssistant:'")
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return tuple(
        Message(ROLES[mark[1]], text[mark.end() : end].removeprefix(" ")) for mark, end in zip(marks, ends, strict=True)
    )
