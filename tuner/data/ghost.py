"""Ghost attention: a system instruction that holds through all turns of a dialogue (Llama 2, arXiv 2307.09288, 3.3).

The paper repeats the instruction in every user turn while it samples an answer (`repeated`, what `tuner generate
--ghost-attention` does), so that the answer obeys it. For training it leaves the instruction at the beginning, and
since the earlier answers may not obey it, nothing but the last answer is trained (`trained`, `data.ghost_attention`).
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
    """The messages without the instruction `say` at the beginning of user turns."""
    if not say:
        return tuple(messages)
    return tuple(replace(m, content=_without(m.content, say)) if m.role == "user" else m for m in messages)


def trained(example: Example) -> Example:
    """The example to train on: the instruction once, and of a dialogue with one only the last answer as a target.

    A message that says `train` or `weight` itself keeps what it says; a dialogue without an instruction is as it was.
    """
    say = instruction((*example.prompt, *example.completions[0]))
    if not say:
        return example
    completions = []
    for completion in example.completions:
        turns = once(completion, say)
        answers = [i for i, m in enumerate(turns) if m.role in ANSWERS]
        silent = set(answers[:-1])
        completions.append(
            tuple(replace(m, train=False) if i in silent and m.train is None else m for i, m in enumerate(turns))
        )
    return replace(example, prompt=once(example.prompt, say), completions=tuple(completions))


def _without(content: str, say: str) -> str:
    rest = content.removeprefix(say)
    return rest.lstrip() if rest != content and rest[:1].isspace() else content
