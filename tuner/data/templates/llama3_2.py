"""Messages -> the Llama 3.2 instruct format (Meta's llama-models repository, models/llama3_2/text_prompt_format.md).

It is Llama 3.1's without built-in tools. The checkpoint's own template writes today's date where no `date_string` is
given; ours writes a fixed one, so that the ids do not change from day to day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template
from tuner.data.templates._llama3 import DATE, END, EOT, ROLES, START, tool_jinja, tool_pieces
from tuner.types import Message


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    date_string: str = DATE,
    tools_in_user_message: bool = True,
) -> list[Piece]:
    """The options are those of the checkpoint's own template; see `tool_pieces`."""
    return tool_pieces(messages, add_generation_prompt, tools, date_string, tools_in_user_message)


def write(date_string: str = DATE, tools_in_user_message: bool = True) -> str:
    """The Jinja text with these options."""
    return tool_jinja("Llama 3.2 instruct", date_string=date_string, tools_in_user_message=tools_in_user_message)


TEMPLATE = Template(
    name="llama3.2",
    jinja=write(),
    control=(BOS, START, END, EOT),
    terminators=(EOT,),
    roles=ROLES,
    pieces=pieces,
    tools=True,
    write=write,
    # the text in Meta's Llama 3.2 instruct checkpoints, which differs from this in its date alone
    also=frozenset({"e5d1be38152b51e7d538ba6201a06fe9de7a7abe218bd5cb4a49ca9e0b66b8de"}),
)
