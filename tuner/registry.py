"""Name -> function. An unknown name lists near misses; parameters are validated from the function's own signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tuner.errors import RecipeError

T = TypeVar("T", bound=Callable[..., Any])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
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
        schema = _parameter_schema(self.get(name))
        try:
            return schema(**values).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                hint = did_you_mean(key, schema.model_fields)
                known = ", ".join(schema.model_fields) or "none"
                message = f"{self.kind} '{name}' has no parameter '{key}'{hint}; its parameters: {known}"
            else:
                message = f"{self.kind} '{name}': {key}={values.get(key)!r}: {first['msg']}"
            raise RecipeError(message) from None


def _parameter_schema(fn: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(fn)
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters}
    return create_model(fn.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
