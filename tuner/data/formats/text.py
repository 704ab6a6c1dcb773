"""`{"text": "..."}` rows -> Example of raw text, which no template wraps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column
from tuner.errors import DataError
from tuner.types import Example, Message


@FORMATS.register("text")
class Text(Format):
    """One document: BOS, the text, EOS."""

    columns = ("text",)
    looks_for = "a column 'text'"

    @staticmethod
    def detect(keys: Collection[str]) -> bool:
        return "text" in keys

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        content = as_text(column(row, columns, "text"), columns.get("text", "text"))
        if not content:
            raise DataError(f"{columns.get('text', 'text')} is empty; remove the row")
        return Example(prompt=(), completions=((Message("text", content),),))
