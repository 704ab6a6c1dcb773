"""Plain text, no published format: BOS, the contents as they are, EOS after each answer (templates/plain.py).

It has no place for tools.
"""

from __future__ import annotations

from typing import Any

from published import BOS, EOS


def render(row: dict[str, Any]) -> str | None:
    if "tools" in row or any(m["role"] == "tool" or "tool_calls" in m for m in row["messages"]):
        return None
    text = BOS
    for message in row["messages"]:
        text += f"«{message['content']}{EOS}»" if message["role"] == "assistant" else message["content"]
    return text
