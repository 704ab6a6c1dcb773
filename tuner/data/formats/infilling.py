"""`{"prefix", "suffix", "middle"}` rows -> Example of code (or text) whose middle is to be filled in.

The template decides in which order the parts stand (see `tuner.data.templates.codellama`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column
from tuner.types import Example, Message


@FORMATS.register("infilling")
class Infilling(Format):
    """What stands before and after a gap, and what belongs in it, to the letter. Each of them may be empty."""

    kind = "chat"
    columns = ("prefix", "suffix", "middle")
    looks_for = "columns 'prefix', 'suffix' and 'middle'"

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return all(name in row for name in Infilling.columns)

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        prefix, suffix, middle = (
            Message(name, as_text(column(row, columns, name), columns.get(name, name))) for name in Infilling.columns
        )
        return Example(prompt=(prefix, suffix), completions=((middle,),))
