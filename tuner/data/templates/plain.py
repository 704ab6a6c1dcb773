"""Messages -> their bare text: BOS, prompt, completion, EOS. No headers, nothing trimmed, EOS after each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template
from tuner.types import Message

JINJA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """An answer is cut from its prompt, as in generation."""
    out = [Piece(BOS, control=True)]
    for i, message in enumerate(messages):
        if message.role == "assistant":
            out += [Piece(message.content, owner=i, message=i), Piece(EOS, True, i, i)]
        else:
            out.append(Piece(message.content, message=i))
    return out


TEMPLATE = Template(
    name="plain",
    jinja=JINJA,
    control=(BOS, EOS),
    terminators=(EOS,),
    roles=("system", "user", "assistant"),
    pieces=pieces,
)
