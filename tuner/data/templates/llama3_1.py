"""Messages -> the Llama 3.1 instruct format (Meta's llama-models repository, models/llama3_1/prompt_format.md).

The rendering is that of the checkpoint's own template; `_llama3.py` shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template
from tuner.data.templates._llama3 import DATE, END, EOM, EOT, PYTHON, ROLES, START, tool_jinja, tool_pieces
from tuner.types import Message


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    date_string: str = DATE,
    tools_in_user_message: bool = True,
    builtin_tools: tuple[str, ...] | None = None,
) -> list[Piece]:
    """The options are those of the checkpoint's own template; see `tool_pieces`."""
    return tool_pieces(messages, add_generation_prompt, tools, date_string, tools_in_user_message, builtin_tools)


def write_with_title(
    title: str,
    *,
    date_string: str = DATE,
    tools_in_user_message: bool = True,
    builtin_tools: tuple[str, ...] | None = None,
) -> str:
    """The Jinja text with these options; its first line, the title, is what tells it from one that renders the same."""
    return tool_jinja(
        title,
        date_string=date_string,
        tools_in_user_message=tools_in_user_message,
        builtin_tools=builtin_tools,
    )


write = functools.partial(write_with_title, "Llama 3.1 instruct")

TEMPLATE = Template(
    name="llama3.1",
    jinja=write(),
    control=(BOS, START, END, EOT),
    optional=(EOM, PYTHON),  # of built-in tools
    terminators=(EOT, EOM),
    roles=ROLES,
    pieces=pieces,
    tools=True,
    write=write,
    # the text in Meta's Llama 3.1 and 3.3 instruct checkpoints
    also=frozenset({"36d799eb68eb16194d74602c6486bc8c33e2d20829e8a3f80c6c9d104cf77d39"}),
)
