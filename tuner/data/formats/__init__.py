"""On-disk shapes of a row -> Example. One file here is one format; adding a file adds the format.

Each file registers a `Format` under its name; a file whose name begins with `_` is shared by several. A canonical
column name (`prompt`) may stand for another column of the file (`question`) through `data.columns`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from tuner.data.report import listed
from tuner.errors import DataError, RecipeError
from tuner.registry import Registry, did_you_mean
from tuner.types import Example

# What a row is: a conversation to imitate, a raw document, or completions to compare or judge.
Kind = Literal["chat", "text", "preference"]


LARGEST = 1e30  # of a number in a row: the sum of many still fits into a 32-bit float


class ArrowRow(dict[str, Any]):
    """A row that Arrow has made (parquet, a Hub data set).

    An Arrow column has one type, so every object in it has the keys of all rows, null where its own row has none. A
    null in there may be the row's own or not; a format that has to know refuses it.
    """


class Format(ABC):
    """One on-disk shape. Used as a namespace, never instantiated."""

    kind: ClassVar[Kind]
    columns: ClassVar[tuple[str, ...]]  # canonical names of the columns it reads
    looks_for: ClassVar[str]  # how people recognise it

    @staticmethod
    @abstractmethod
    def detect(row: Mapping[str, Any]) -> bool:
        """Whether a row, under its canonical column names, looks like this format."""

    @staticmethod
    @abstractmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        """The example of a row, still without its source and row number. A DataError says what is wrong, not where."""

    @classmethod
    def reason(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
        """Why a row that looks like this format does."""
        return f"has {cls.looks_for}"

    @classmethod
    def unread(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[str]:
        """The columns of a row, or the keys inside of them, that are not read."""
        read = {columns.get(c, c) for c in cls.columns}
        return (str(key) for key in row if key not in read)


FORMATS: Registry[type[Format]] = Registry("data format")


class Detected(NamedTuple):
    """The format of a row, and why."""

    name: str
    reason: str


def detect(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Detected:
    """The format that a row has.

    Raises:
        DataError: no format fits; says what the row has and what was looked for.
    """
    columns = columns or {}
    canonical = {**row, **{name: row[actual] for name, actual in columns.items() if actual in row}}
    fitting = (n for n in FORMATS if set(columns) <= set(FORMATS.get(n).columns))
    fits = sorted(n for n in fitting if FORMATS.get(n).detect(canonical))
    if not fits:
        looked = "; ".join(f"{n} ({FORMATS.get(n).looks_for})" for n in FORMATS)
        raise DataError(
            f"no data format fits a row with {describe_columns(row)}; looked for: {looked}. Name the columns, e.g. "
            "data.columns: {prompt: question, completion: answer}, or rename them in the file"
        )
    reason = FORMATS.get(fits[0]).reason(row, columns)
    if len(fits) > 1:
        reason += f"; it also looks like {', '.join(fits[1:])}: set data.format to choose"
    return Detected(fits[0], reason)


def parser(name: str, columns: Mapping[str, str] | None = None) -> Callable[[Mapping[str, Any]], Example]:
    """The function row -> Example of the format `name`, after a check that `columns` names what the format reads."""
    fmt, columns = FORMATS.get(name), dict(columns or {})
    for canonical in columns:
        if canonical not in fmt.columns:
            hint = did_you_mean(canonical, fmt.columns)
            reads = ", ".join(fmt.columns)
            raise RecipeError(f"data.columns: format '{name}' reads no '{canonical}'{hint}; it reads: {reads}")
    return lambda row: fmt.parse(row, columns)


def unread_columns(name: str, row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> list[str]:
    """The columns of a row that the format `name` has no use for, and such keys in lists of messages: each once."""
    return list(dict.fromkeys(FORMATS.get(name).unread(row, columns or {})))


def column(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """The value of the canonical column `name`; a DataError that lists the row's columns where there is none."""
    actual = columns.get(name, name)
    if actual not in row:
        mapped = f" (data.columns maps {name} to it)" if actual != name else ""
        hint = did_you_mean(actual, row)
        raise DataError(f"there is no column '{actual}'{mapped}{hint}; the row has {describe_columns(row)}")
    return row[actual]


def optional(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """The value of a column that a row may lack; None also for an empty cell, which is what CSV has in its place."""
    value = row.get(columns.get(name, name))
    return None if isinstance(value, str) and not value else value


def describe_columns(row: Mapping[str, Any]) -> str:
    """`the columns a, b`, with at most ten names."""
    return f"the columns {listed(map(str, row))}" if row else "no columns"


def as_text(value: Any, what: str) -> str:
    """`value` if it is a string that UTF-8 can hold; otherwise a DataError that names `what`."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {shorten(value)}, not a string")
    try:
        value.encode()  # JSON may spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {value[error.start]!r}, half of a surrogate pair; replace it in the file",
            kind="lone_surrogate",
        ) from None
    return value


def as_number(value: Any, what: str) -> float:
    """`value` if it is a finite number, or a string that spells one (CSV); otherwise a DataError that names `what`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{what} is {shorten(value)}; write a number")
    if abs(number) > LARGEST:
        raise DataError(f"{what} is {shorten(value)}, and nothing larger than {LARGEST:g} can be computed with")
    return number


def shorten(value: Any) -> str:
    """A value for an error message: `null`, or its repr up to 60 characters."""
    shown = "null" if value is None else repr(value[:60] if isinstance(value, str) else value)
    if isinstance(value, str) and len(value) > 60:
        return shown[:57] + "..."
    return shown if len(shown) <= 60 else shown[:57] + "..."


for _module in pkgutil.iter_modules(__path__):  # alphabetical; this is what makes a format one file
    importlib.import_module(f"{__name__}.{_module.name}")
