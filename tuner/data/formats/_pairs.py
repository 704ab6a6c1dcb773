"""Two conversations that begin alike -> the prompt that they share, and the completion of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tuner.errors import DataError
from tuner.types import Message

Turns = tuple[Message, ...]


def divide(chosen: Turns, rejected: Turns, names: Sequence[str]) -> tuple[Turns, tuple[Turns, Turns]]:
    """The prompt is the longest beginning that both share, as far as it leaves each of them an answer.

    So it reaches at least to the last user turn that they share, and the completions may have several turns. Two equal
    conversations differ in nothing: their last answer is taken for the completion.

    Raises:
        DataError: they do not begin alike, or they go apart where somebody else than the assistant speaks.
    """
    first, second = names
    for turns, name in zip((chosen, rejected), names, strict=True):
        if turns[-1].role != "assistant":
            raise DataError(f"{name} ends with a {turns[-1].role} turn, so that it has no answer; remove the row")
    shared = sum(1 for _ in itertools.takewhile(lambda pair: same(*pair), zip(chosen, rejected, strict=False)))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    for turns, name in zip((chosen, rejected), names, strict=True):
        if turns[shared].role != "assistant":
            raise DataError(
                f"{first} and {second} go apart at message {shared}, which is a {turns[shared].role} turn in {name}; a "
                "pair has two answers to one prompt: remove the row"
            )
    if not shared:
        raise DataError(f"{first} and {second} have no prompt: they begin with the answer; add the prompt")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def same(one: Message, other: Message) -> bool:
    """Whether two messages are equal, in the order of their arguments too, and in 1 being neither 1.0 nor true."""
    return one == other and repr(one.tool_calls) == repr(other.tool_calls)
