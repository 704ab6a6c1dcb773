"""Messages -> the Llama 2 chat format (`chat_completion` in generation.py of Meta's llama repository).

    <s>[INST] <<SYS>>
    Be brief.
    <</SYS>>

    Hello [/INST] Hi </s><s>[INST] And? [/INST] Well </s>

BOS comes before every user turn. The system text goes into the first user turn, before that turn is trimmed. An answer
is trimmed, has a blank on either side, and ends with EOS. Roles must alternate; there is no place for tools.

`[INST]` and `<<SYS>>` are plain text in this format. A user who writes them cannot make a control token, but can
imitate one: nothing in the ids tells a real `[/INST]` from a written one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template
from tuner.errors import DataError
from tuner.types import Message

JINJA = """\
{%- set system = messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if system else messages %}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant turns must alternate, user first') }}
    {%- elif loop.index0 % 2 %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- elif loop.first and system %}
        {%- set content = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + message['content'] %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}
        {{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
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
    out: list[Piece] = []
    for i, message in enumerate(messages[first:], first):
        if message.role == "assistant":
            out += [Piece(f" {message.content.strip()} ", owner=i, message=i), Piece(EOS, True, i, i)]
            continue
        lead = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n" if first and i == first else ""
        content = (lead + message.content).strip()
        cut = min(len(lead), len(content))  # nothing but blanks in a turn: the text loses its own trailing ones
        out += [Piece(BOS, True, message=i), Piece("[INST] " + content[:cut], message=0 if lead else i)]
        out.append(Piece(content[cut:] + " [/INST]", message=i))
    return out


def check_alternation(turns: Sequence[Message], first: int, add_generation_prompt: bool) -> None:
    """Refuses turns that are not user, assistant, user, ...; `first` is the index of the first of them.

    Raises:
        DataError: they do not alternate, or there is no user turn to answer.
    """
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            raise DataError(
                f"message {first + i} has the role {turn.role!r} where the template wants "
                f"{('user', 'assistant')[i % 2]!r}: after an optional system message, user and assistant turns must "
                "alternate, user first; merge or remove turns, or choose another data.chat_template"
            )
    if not turns or (add_generation_prompt and len(turns) % 2 == 0):
        raise DataError(
            "the last message is not a user turn, which this template needs before an answer; add one, or choose "
            "another data.chat_template"
        )


TEMPLATE = Template(
    name="llama2",
    jinja=JINJA,
    control=(BOS, EOS),
    terminators=(EOS,),
    roles=("system", "user", "assistant"),
    pieces=pieces,
    # the text in Meta's Llama 2 chat checkpoints
    also=frozenset({"eec3dad75908c008e6cf50b061da422c501828a9e37ec28f7e5651bfb766ba72"}),
)
