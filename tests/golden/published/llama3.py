"""Llama 3 instruct: Meta's Llama 3 model card and prompt format, and `chat_template` of Meta-Llama-3-8B-Instruct.

Every turn is a header, two newlines, the trimmed content and `<|eot_id|>`. It has no place for tools.
"""

from __future__ import annotations

from typing import Any

from published import BOS


def render(row: dict[str, Any]) -> str | None:
    if "tools" in row or any(m["role"] == "tool" or "tool_calls" in m for m in row["messages"]):
        return None
    text = BOS
    for message in row["messages"]:
        start, end = ("«", "»") if message["role"] == "assistant" else ("", "")
        text += f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        text += f"{start}{message['content'].strip()}<|eot_id|>{end}"
    return text
