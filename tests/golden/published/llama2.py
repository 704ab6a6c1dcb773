"""Llama 2 chat: `chat_completion` in llama/generation.py of Meta's repository, and Llama-2-7b-chat-hf's own template.

BOS before every user turn, `[INST] ` and ` [/INST]` around it, ` answer ` and EOS after it. The system text goes into
the first user turn between `<<SYS>>` and `<</SYS>>`, before that turn is trimmed. Roles must alternate; no tools.
"""

from __future__ import annotations

from typing import Any

from published import BOS, EOS


def render(row: dict[str, Any]) -> str | None:
    turns = list(row["messages"])
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    if "tools" in row or [m["role"] for m in turns] != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return None
    if any("tool_calls" in m for m in turns):
        return None
    text = ""
    for i, turn in enumerate(turns):
        content = turn["content"]
        if i == 0 and system is not None:
            content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
        text += f"{BOS}[INST] {content.strip()} [/INST]" if i % 2 == 0 else f"« {content.strip()} {EOS}»"
    return text
