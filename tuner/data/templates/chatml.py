"""Messages -> ChatML.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi<|im_end|>

A Llama model has seen BOS before every document, so BOS comes first if the tokenizer has one; where a tokenizer names
`<|im_start|>` itself as its BOS, the first turn already begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template
from tuner.types import Message

START, END = "<|im_start|>", "<|im_end|>"

JINJA = """\
{%- if bos_token and bos_token != '<|im_start|>' %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """The newline after a turn's end belongs to no answer."""
    out = [Piece(BOS, control=True)]
    for i, message in enumerate(messages):
        header = message.role + "\n"
        out.append(Piece(START, True, message=i))
        if message.role == "assistant":
            out += [Piece(header, message=i), Piece(message.content, owner=i, message=i), Piece(END, True, i, i)]
        else:
            out += [Piece(header + message.content, message=i), Piece(END, True, message=i)]
        out.append(Piece("\n", message=i))
    if add_generation_prompt:
        out += [Piece(START, True), Piece("assistant\n")]
    return out


TEMPLATE = Template(
    name="chatml",
    jinja=JINJA,
    control=(START, END),
    terminators=(END,),
    roles=("system", "user", "assistant"),
    pieces=pieces,
)
