"""On-disk shapes of a row -> Example. One file here is one format; adding a file adds the format.

Each file registers a `Format` under its name. A canonical column name (`prompt`) may stand for another column of the
file (`question`) through `data.columns`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

from tuner.errors import DataError, RecipeError
from tuner.registry import Registry, did_you_mean
from tuner.types import Example


class Format(ABC):
    """One on-disk shape. Used as a namespace, never instantiated."""

    columns: ClassVar[tuple[str, ...]]  # canonical names of the columns it reads
    looks_for: ClassVar[str]  # how people recognise it

    @staticmethod
    @abstractmethod
    def detect(keys: Collection[str]) -> bool:
        """Whether a row with these (canonical) columns looks like this format."""

    @staticmethod
    @abstractmethod
    def parse(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        """The example of a row, still without its source and row number. A DataError says what is wrong, not where."""


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
    keys = set(row) | {name for name, actual in columns.items() if actual in row}
    fits = [n for n in FORMATS if set(columns) <= set(FORMATS.get(n).columns) and FORMATS.get(n).detect(keys)]
    if not fits:
        looked = "; ".join(f"{n} ({FORMATS.get(n).looks_for})" for n in FORMATS)
        raise DataError(
            f"no data format fits a row with {describe_columns(row)}; looked for: {looked}. Name the columns, e.g. "
            "data.columns: {prompt: question, completion: answer}, or rename them in the file"
        )
    reason = f"has {FORMATS.get(fits[0]).looks_for}"
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
    """The columns of a row that the format `name` has no use for."""
    read = {(columns or {}).get(c, c) for c in FORMATS.get(name).columns}
    return [str(key) for key in row if key not in read]


def column(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """The value of the canonical column `name`; a DataError that lists the row's columns where there is none."""
    actual = columns.get(name, name)
    if actual not in row:
        mapped = f" (data.columns maps {name} to it)" if actual != name else ""
        hint = did_you_mean(actual, row)
        raise DataError(f"there is no column '{actual}'{mapped}{hint}; the row has {describe_columns(row)}")
    return row[actual]


def describe_columns(row: Mapping[str, Any]) -> str:
    """`the columns a, b`, with at most ten names."""
    names = [str(k) for k in row]
    return "the columns " + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "no columns"


def as_text(value: Any, what: str) -> str:
    """`value` if it is a string that UTF-8 can hold; otherwise a DataError that names `what`."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {shorten(value)}, not a string")
    try:
        value.encode()  # JSON may spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {value[error.start]!r}, half of a surrogate pair; replace it in the file"
        ) from None
    return value


def shorten(value: Any) -> str:
    """A value for an error message: `null`, or its repr up to 60 characters."""
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


for _module in pkgutil.iter_modules(__path__):  # alphabetical; this is what makes a format one file
    importlib.import_module(f"{__name__}.{_module.name}")
