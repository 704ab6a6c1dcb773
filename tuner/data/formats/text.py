"""`{"text": "..."}` rows -> Example of raw text, which no template wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column
from tuner.errors import DataError
from tuner.types import Example, Message


@FORMATS.register("text")
class Text(Format):
    """One document: BOS, the text, EOS."""

    kind = "text"
    columns = ("text",)
    looks_for = "a column 'text'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return "text" in row

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        content = as_text(column(row, columns, "text"), columns.get("text", "text"))
        if not content:
            raise DataError(f"{columns.get('text', 'text')} is empty; remove the row", kind="nothing_to_train")
        return Example(prompt=(), completions=((Message("text", content),),))
