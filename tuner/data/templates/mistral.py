"""Messages -> the first Mistral instruct format (Mistral 7B Instruct v0.1 and v0.2, Mixtral 8x7B Instruct v0.1).

    <s> [INST] Be brief.

    Hello [/INST] Hi</s> [INST] And? [/INST] Well</s>

Published in the model cards and checkpoints of Mistral AI, and as the V1 instruct tokenizer of mistral-common. The
system text goes into the first user turn, before an empty line. Nothing is trimmed, and an answer ends with EOS. Roles
must alternate; there is no place for tools.

`[INST]` is plain text in this format: a user who writes it cannot make a control token, but can imitate one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template
from tuner.data.templates.llama2 import check_alternation
from tuner.types import Message

JINJA = """\
{%- set system = messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant turns must alternate, user first') }}
    {%- elif loop.index0 % 2 %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- ' [INST] ' }}
        {%- if loop.first and system %}
            {{- messages[0]['content'] + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
{%- if not turns or (add_generation_prompt and turns | length % 2 == 0) %}
    {{- raise_exception('an answer needs a user turn before it') }}
{%- endif %}
"""


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """A prompt ends with `[/INST]`, so the blank after it belongs to the answer.

    Raises:
        DataError: the roles do not alternate, or there is no user turn to answer.
    """
    first = int(bool(messages) and messages[0].role == "system")
    check_alternation(messages[first:], first, add_generation_prompt)
    out = [Piece(BOS, control=True)]
    for i, message in enumerate(messages[first:], first):
        if message.role == "assistant":
            out += [Piece(f" {message.content}", owner=i, message=i), Piece(EOS, True, i, i)]
        else:
            out.append(Piece(" [INST] ", message=i))
            if i == first == 1:
                out.append(Piece(f"{messages[0].content}\n\n", message=0))
            out.append(Piece(f"{message.content} [/INST]", message=i))
    return out


TEMPLATE = Template(
    name="mistral",
    jinja=JINJA,
    control=(BOS, EOS),
    terminators=(EOS,),
    roles=("system", "user", "assistant"),
    pieces=pieces,
)
