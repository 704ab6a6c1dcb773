"""ChatML: OpenAI's chat markup, with tools as in Qwen2.5's checkpoints and NousResearch's Hermes function calling.

Here BOS comes first, and a chat without a system message gets no default one; with tools its system turn holds them.
"""

from __future__ import annotations

import json
from typing import Any

from published import BOS

BEFORE = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
AFTER = """\

</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def render(row: dict[str, Any]) -> str | None:
    turns = list(row["messages"])
    text = BOS
    if row.get("tools"):
        schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in row["tools"])
        system = turns.pop(0)["content"] + "\n\n" if turns[0]["role"] == "system" else ""
        text += f"<|im_start|>system\n{system}{BEFORE}{schemas}{AFTER}<|im_end|>\n"
    results: list[str] = []
    for turn, following in zip(turns, [*turns[1:], {"role": "end"}], strict=True):
        if turn["role"] == "tool":
            results.append(f"<tool_response>\n{turn['content']}\n</tool_response>")
            if following["role"] != "tool":
                text += "<|im_start|>user\n" + "\n".join(results) + "<|im_end|>\n"
                results = []
        elif turn["role"] == "assistant":
            parts = [turn["content"]] if turn["content"] or "tool_calls" not in turn else []
            for call in turn.get("tool_calls", []):
                parts.append(f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>")
            text += "<|im_start|>assistant\n«" + "\n".join(parts) + "<|im_end|>»\n"
        else:
            text += f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
    return text
