"""Messages -> the Llama 3.3 instruct format (Meta's llama-models repository, models/llama3_3/prompt_format.md).

It is Llama 3.1's: Llama 3.3 instruct checkpoints carry the very template text of 3.1. So `auto` calls such a checkpoint
`llama3.1`, which renders the same; a directory saved with this template is called `llama3.3` by the title of its text.
"""

from __future__ import annotations

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


def write(
    date_string: str = DATE, tools_in_user_message: bool = True, builtin_tools: tuple[str, ...] | None = None
) -> str:
    """The Jinja text with these options."""
    return tool_jinja(
        "Llama 3.3 instruct",
        date_string=date_string,
        tools_in_user_message=tools_in_user_message,
        builtin_tools=builtin_tools,
    )


TEMPLATE = Template(
    name="llama3.3",
    jinja=write(),
    control=(BOS, START, END, EOT),
    optional=(EOM, PYTHON),  # of built-in tools
    terminators=(EOT, EOM),
    roles=ROLES,
    pieces=pieces,
    tools=True,
    write=write,
    # Meta's own text is that of Llama 3.1, and recognised as such
)
