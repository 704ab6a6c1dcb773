"""Mistral 7B Instruct v0.3: mistral-common's V3 instruct tokenizer, and the template in the checkpoint.

Schemas before the last user turn and the system text in it, `[INST] question[/INST] answer` and EOS with the answer
trimmed; calls as a JSON list with their ids, each result as an object with its call_id. Ids have nine characters. Text
beside a call is refused.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from published import BOS, EOS

# what its tokenizer has beside the golden one's
CONTROL = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)


def render(row: dict[str, Any]) -> str | None:
    turns = list(row["messages"])
    system = turns.pop(0)["content"] + "\n\n" if turns[0]["role"] == "system" else ""
    if any(a["role"] == b["role"] != "tool" for a, b in itertools.pairwise(turns)):
        return None
    asks = [i for i, m in enumerate(turns) if m["role"] == "user"]
    text = BOS
    for i, turn in enumerate(turns):
        content, calls = turn["content"], turn.get("tool_calls", [])
        if turn["role"] == "user":
            schemas = json.dumps(row.get("tools", []), ensure_ascii=False)
            here = i == asks[-1]
            text += f"[AVAILABLE_TOOLS] {schemas}[/AVAILABLE_TOOLS]" if here and schemas != "[]" else ""
            text += "[INST] " + (system if here else "") + content + "[/INST]"
        elif turn["role"] == "tool":
            text += f'[TOOL_RESULTS] {{"content": {content}, "call_id": "{turn["tool_call_id"]}"}}[/TOOL_RESULTS]'
        elif calls and content:
            return None
        elif calls:
            out = [c["function"] | {"id": c["id"]} for c in calls]
            text += f"«[TOOL_CALLS] {json.dumps(out, ensure_ascii=False)}{EOS}»"
        else:
            text += f"« {content.strip()}{EOS}»"
    return text
