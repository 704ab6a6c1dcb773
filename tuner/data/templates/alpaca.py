"""Messages -> the prompts of Stanford Alpaca (`PROMPT_DICT` in train.py of its repository, without and with an input).

    <s>Below is an instruction that describes a task. Write a response that appropriately completes the request.

    ### Instruction:
    Say hello.

    ### Response:Hello.</s>

The answer follows the colon at once, as it does there. Published is one turn; later turns go on with an empty line and
`### Instruction:` without the preamble. A system message stands in the place of the preamble. Nothing is trimmed, and
EOS ends each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template
from tuner.errors import DataError
from tuner.types import Message

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
)
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:"

JINJA = """\
{{- bos_token }}
{%- set seen = namespace(role='') %}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- if role == 'system' and loop.first %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif role == 'user' and seen.role in ('', 'system', 'assistant') %}
        {%- if seen.role == 'assistant' %}
            {{- '\\n\\n' }}
        {%- elif loop.first and loop.nextitem is defined and loop.nextitem['role'] == 'input' %}
            {{- PREAMBLE_WITH_INPUT }}
        {%- elif loop.first %}
            {{- PREAMBLE }}
        {%- endif %}
        {{- '### Instruction:\\n' + message['content'] }}
    {%- elif role == 'input' and seen.role == 'user' %}
        {{- '\\n\\n### Input:\\n' + message['content'] }}
    {%- elif role == 'assistant' and seen.role in ('user', 'input') %}
        {{- '\\n\\n### Response:' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('turns go instruction (user), input, response (assistant)') }}
    {%- endif %}
    {%- set seen.role = role %}
{%- endfor %}
{%- if add_generation_prompt and seen.role in ('user', 'input') %}
    {{- '\\n\\n### Response:' }}
{%- elif add_generation_prompt %}
    {{- raise_exception('a response needs an instruction before it') }}
{%- endif %}
"""
JINJA = JINJA.replace("PREAMBLE_WITH_INPUT", repr(PREAMBLE_WITH_INPUT)).replace("PREAMBLE", repr(PREAMBLE))

# what may come before each role
_AFTER = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "input": ("user",),
    "assistant": ("user", "input"),
}


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """A prompt ends with `### Response:`.

    Raises:
        DataError: the turns do not go instruction, input (or none), response.
    """
    out = [Piece(BOS, control=True)]
    before = ""
    for i, message in enumerate(messages):
        if before not in _AFTER[message.role]:
            raise DataError(
                f"message {i} has the role {message.role!r} after {before or 'nothing'!r}: after an optional system "
                "message come user, input (or none) and assistant turns, again and again; merge or remove turns, or "
                "choose another data.chat_template"
            )
        if message.role == "system":
            out.append(Piece(f"{message.content}\n\n", message=i))
        elif message.role == "user":
            paired = i + 1 < len(messages) and messages[i + 1].role == "input"
            opening = {"": PREAMBLE_WITH_INPUT if paired else PREAMBLE, "system": "", "assistant": "\n\n"}[before]
            out.append(Piece(opening + INSTRUCTION + message.content, message=i))
        elif message.role == "input":
            out.append(Piece(INPUT + message.content, message=i))
        else:
            out += [Piece(RESPONSE, message=i), Piece(message.content, owner=i, message=i), Piece(EOS, True, i, i)]
        before = message.role
    if add_generation_prompt:
        if before not in _AFTER["assistant"]:
            raise DataError(
                "the last message is neither a user nor an input turn, one of which this template needs before an "
                "answer; add one, or choose another data.chat_template"
            )
        out.append(Piece(RESPONSE))
    return out


TEMPLATE = Template(
    name="alpaca",
    jinja=JINJA,
    control=(BOS, EOS),
    terminators=(EOS,),
    roles=("system", "user", "input", "assistant"),
    pieces=pieces,
)
