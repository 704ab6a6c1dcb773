"""Ghost attention: a system instruction that holds through all turns of a dialogue (Llama 2, arXiv 2307.09288, 3.3).

The paper repeats the instruction in every user turn while it samples an answer (`repeated`, what `tuner generate
--ghost-attention` does), so that the answer obeys it. For training it leaves the instruction at the beginning, and
since the earlier answers may not obey it, nothing of the earlier turns is trained (`trained`, `data.ghost_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tuner.types import ANSWERS, Example, Message

GAP = "\n\n"  # between the instruction and what the user says


def instruction(messages: Sequence[Message]) -> str:
    """The system instruction of a dialogue; empty if it has none."""
    return messages[0].content.strip() if messages and messages[0].role == "system" else ""


def repeated(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with the system instruction before what the user says, in every turn."""
    say = instruction(messages)
    if not say:
        return tuple(messages)
    return tuple(replace(m, content=f"{say}{GAP}{m.content}") if m.role == "user" else m for m in messages)


def once(messages: Sequence[Message], say: str) -> tuple[Message, ...]:
    """What `repeated` was made from: the messages without the instruction `say` and the gap at the beginning of user
    turns. A user turn that only begins with the same words keeps them."""
    if not say:
        return tuple(messages)
    return tuple(replace(m, content=m.content.removeprefix(say + GAP)) if m.role == "user" else m for m in messages)


def trained(example: Example) -> Example:
    """The example to train on: the instruction once, and of a dialogue with one only the last turn as a target.

    The last turn is all that the assistant says after the last question it answers, calls of tools too. A message that
    says `train` itself keeps what it says; a dialogue without an instruction is as it was.
    """
    say = instruction((*example.prompt, *example.completions[0]))
    if not say:
        return example
    completions = (_last_turn(once(completion, say)) for completion in example.completions)
    return replace(example, prompt=once(example.prompt, say), completions=tuple(completions))


def _last_turn(completion: Sequence[Message]) -> tuple[Message, ...]:
    """The completion with `train: false` on all answers before the last user turn that is answered in it."""
    answers = [i for i, m in enumerate(completion) if m.role in ANSWERS]
    asked = [i for i, m in enumerate(completion[: answers[-1]]) if m.role == "user"] if answers else []
    silent = {i for i in answers if asked and i < asked[-1] and completion[i].train is None}
    return tuple(replace(m, train=False) if i in silent else m for i, m in enumerate(completion))
