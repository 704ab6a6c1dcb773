"""Rows with a question and its answer, under one of the usual pairs of column names -> Example.

`data.columns: {question: ..., answer: ...}` names any other pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.data.formats import FORMATS, Format, as_text, column, optional
from tuner.errors import DataError
from tuner.types import Example, Message

PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("prompt", "answer"),
    ("prompt", "response"),
    ("instruction", "answer"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
# Columns that say what an instruction is about: such a row is more than a question and its answer.
CONTEXT = ("input", "context")


@FORMATS.register("question_answer")
class QuestionAnswer(Format):
    """The question is one user turn, the answer one assistant turn; `system`, if not empty, comes before them."""

    kind = "chat"
    columns = ("question", "answer", "system")
    looks_for = "columns 'question' and 'answer', or " + ", ".join(f"{q}/{a}" for q, a in PAIRS[1:])

    @staticmethod
    def detect(row: Mapping[str, Any]) -> bool:
        return bool(_pairs(row))

    @classmethod
    def reason(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
        question, answer = _names(row, columns)
        return f"columns '{question}' and '{answer}' read as prompt and completion"

    @classmethod
    def unread(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[str]:
        question, answer = _names(row, columns)
        return super().unread(row, {"question": question, "answer": answer} | dict(columns))

    @staticmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        if not columns.keys() & {"question", "answer"} and len(found := _pairs(row)) > 1:
            shown = ", ".join(f"{q}/{a}" for q, a in found)
            raise DataError(
                f"the row has more than one pair of columns that may be question and answer ({shown}); choose one, "
                f"e.g. data.columns: {{question: {found[0][0]}, answer: {found[0][1]}}}"
            )
        names = dict(zip(("question", "answer"), _names(row, columns), strict=True))
        question, answer = (as_text(column(row, names, name), names[name]) for name in names)
        turns = [Message("user", question)]
        system = optional(row, columns, "system")
        if system is not None:
            turns.insert(0, Message("system", as_text(system, columns.get("system", "system"))))
        return Example(tuple(turns), ((Message("assistant", answer),),))


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs that a row has; not where an instruction has an output or is about something (Alpaca's rows)."""
    found = [pair for pair in PAIRS if pair[0] in row and pair[1] in row]
    if "instruction" in row:
        found = [
            (q, a) for q, a in found if q != "input" and not (q == "instruction" and any(c in row for c in CONTEXT))
        ]
    return found


def _names(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """What the columns of question and answer are called: as `data.columns` says, or the first pair of the row."""
    question, answer = PAIRS[0] if columns.keys() & {"question", "answer"} else (_pairs(row) or PAIRS)[0]
    return columns.get("question", question), columns.get("answer", answer)
