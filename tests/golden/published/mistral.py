"""Mistral 7B Instruct v0.1 and v0.2: the template in the checkpoints, and mistral-common's V1 instruct tokenizer.

One BOS. ` [INST] ` and ` [/INST]` around a user turn, a blank before an answer and EOS after it. The system text and an
empty line go before the first user text. Nothing is trimmed. Roles must alternate; no tools.
"""

from __future__ import annotations

from typing import Any

from published import BOS, EOS


def render(row: dict[str, Any]) -> str | None:
    turns = [(m["role"], m["content"]) for m in row["messages"]]
    if "tools" in row or any("tool_calls" in m for m in row["messages"]):
        return None
    if turns[0][0] == "system" and turns[1][0] == "user":
        turns[:2] = [("user", turns[0][1] + "\n\n" + turns[1][1])]
    if any(role != "assistant" for role, _ in turns[1::2]) or any(role != "user" for role, _ in turns[::2]):
        return None
    questions = [f" [INST] {text} [/INST]" for _, text in turns[::2]]
    answers = [f"« {text}{EOS}»" for _, text in turns[1::2]]
    return BOS + "".join(q + a for q, a in zip(questions, [*answers, ""], strict=False))
