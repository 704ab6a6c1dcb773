"""Code Llama: chats as Llama 2's, and infilling (`infilling_prompt_tokens` in generation.py of Meta's codellama).

Prefix, suffix and middle follow the tokens of their names; the middle ends with `▁<EOT>`. The checkpoints' tokenizers
spell these tokens so.
"""

from __future__ import annotations

from typing import Any

from published import BOS, llama2

# what its tokenizer has beside the golden one's
CONTROL = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


def render(row: dict[str, Any]) -> str | None:
    parts = {m["role"]: m["content"] for m in row["messages"]}
    if "middle" not in parts:
        return llama2.render(row)
    return f"{BOS}▁<PRE>{parts['prefix']}▁<SUF>{parts['suffix']}▁<MID>«{parts['middle']}▁<EOT>»"
