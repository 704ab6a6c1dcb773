"""What the references of Llama 3.1, 3.2 and 3.3 share.

Published in Meta's llama-models repository (models/llama3_1/prompt_format.md: roles, ipython, JSON and built-in calls)
and in `chat_template` of the instruct checkpoints (the exact sentences, and what is where). Built-in tools are not used
here, so every turn ends with `<|eot_id|>`.
"""

from __future__ import annotations

import json
from typing import Any

from published import BOS

GUIDE = """Given the following functions, please respond with a JSON for a function call with its proper arguments \
that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

"""


def render(row: dict[str, Any]) -> str | None:
    turns = list(row["messages"])
    system = turns.pop(0)["content"].strip() if turns[0]["role"] == "system" else ""
    environment = "Environment: ipython\n" if "tools" in row else ""
    today = f"Cutting Knowledge Date: December 2023\nToday Date: {row.get('date_string', '26 Jul 2024')}\n\n"
    text = f"{BOS}<|start_header_id|>system<|end_header_id|>\n\n{environment}{today}{system}<|eot_id|>"
    for i, turn in enumerate(turns):
        content = (turn["content"] or "").strip()
        if "tool_calls" in turn:
            if len(turn["tool_calls"]) > 1 or content:
                return None
            call = turn["tool_calls"][0]["function"]
            name, arguments = call["name"], json.dumps(call["arguments"], ensure_ascii=False)
            body = f'«{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>»'
        elif turn["role"] == "assistant":
            body = f"«{content}<|eot_id|>»"
        elif turn["role"] == "tool":
            body = json.dumps(turn["content"], ensure_ascii=False) + "<|eot_id|>"
        elif i == 0 and "tools" in row:
            schemas = [json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in row["tools"]]
            body = GUIDE + "".join(schemas) + content + "<|eot_id|>"
        else:
            body = content + "<|eot_id|>"
        role = "ipython" if turn["role"] == "tool" else turn["role"]
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{body}"
    return text
