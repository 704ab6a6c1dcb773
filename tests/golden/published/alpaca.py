"""Stanford Alpaca: `PROMPT_DICT` in train.py of its repository; the output and EOS follow `### Response:` at once.

Ours: later turns go on with an empty line and without the preamble, and a system message stands in its place.
"""

from __future__ import annotations

import itertools
from typing import Any

from published import BOS, EOS

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

"""
WITHOUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

"""


def render(row: dict[str, Any]) -> str | None:
    turns = list(row["messages"])
    if "tools" in row or any("tool_calls" in m for m in turns):
        return None
    if any(a["role"] == b["role"] for a, b in itertools.pairwise(turns)):
        return None
    with_input = [m["role"] for m in turns[:2]] == ["user", "input"]
    text = turns.pop(0)["content"] + "\n\n" if turns[0]["role"] == "system" else WITH_INPUT if with_input else WITHOUT
    text = BOS + text
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            text += ("\n\n" if i else "") + "### Instruction:\n" + turn["content"]
        elif turn["role"] == "input":
            text += "\n\n### Input:\n" + turn["content"]
        else:
            text += f"\n\n### Response:«{turn['content']}{EOS}»"
    return text
