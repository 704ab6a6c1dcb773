"""Name -> function. An unknown name lists near misses; parameters are validated from the function's own signature."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tuner.errors import RecipeError

T = TypeVar("T", bound=Callable[..., Any])


MAX_NAME = 200  # characters of a name that others are compared with


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or an empty string."""
    name = str(name)
    if len(name) > MAX_NAME:  # as data may have it, where a name should be; the search would take seconds
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


class Registry(Generic[T]):
    """Functions of one kind by name, e.g. losses or data formats."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a function under `name`; a second registration of a name is a programming error."""

        def add(fn: T) -> T:
            assert name not in self._entries, f"{self.kind} '{name}' is registered twice"
            self._entries[name] = fn
            return fn

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get(self, name: str) -> T:
        """The function called `name`; otherwise a RecipeError that lists what there is."""
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise RecipeError(f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}; known: {known}")
        return self._entries[name]

    def parameters(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` checked against the keyword-only parameters of the function, with its defaults filled in."""
        return check_parameters(self.get(name), values, f"{self.kind} '{name}'", "parameter")


def check_parameters(
    fn: Callable[..., Any], values: Mapping[str, Any], what: str, noun: str, without: Sequence[str] = ()
) -> dict[str, Any]:
    """`values` checked against the keyword-only parameters of `fn` but those `without`, with its defaults filled in.

    Raises:
        RecipeError: an unknown name or a value of another type; `what` has which `noun`s.
    """
    schema = _parameter_schema(fn, tuple(without))
    try:
        return schema(**values).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, schema.model_fields)
            known = ", ".join(schema.model_fields) or "none"
            message = f"{what} has no {noun} '{key}'{hint}; its {noun}s: {known}"
        else:
            message = f"{what}: {key}={values.get(key)!r}: {first['msg']}"
        raise RecipeError(message) from None


def _parameter_schema(fn: Callable[..., Any], without: tuple[str, ...]) -> type[BaseModel]:
    plain = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
    hints = get_type_hints(plain, include_extras=True)  # with the bounds of Annotated
    parameters = [p for p in inspect.signature(plain).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters if p.name not in without
    }
    return create_model(plain.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
