"""Messages -> the third Mistral instruct format, with control tokens and tools (Mistral 7B Instruct v0.3).

    <s>[AVAILABLE_TOOLS] [{"type": "function", ...}][/AVAILABLE_TOOLS][INST] Weather in Paris?[/INST][TOOL_CALLS]
     [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}]</s>[TOOL_RESULTS]
     {"content": 21, "call_id": "VvvODy9mT"}[/TOOL_RESULTS] It is 21 degrees.</s>

(the line breaks are not part of it). Published as the V3 instruct tokenizer of mistral-common, and in the template of
the checkpoint. As there, tools and the system text stand in the last user turn: the answers to earlier turns are
trained without them, unless each turn is a row of its own. An answer is trimmed. Call ids have nine letters or digits.

Where the two publications differ: the result of a call is written as it is, like the checkpoint's template does
(mistral-common puts a text that is no JSON in quotes), and the system text is kept when the last message is not a user
turn, like mistral-common does (the checkpoint's template drops it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template, tojson
from tuner.errors import DataError
from tuner.types import Message

INST, END_INST = "[INST]", "[/INST]"
TOOLS, END_TOOLS = "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"
CALLS, RESULTS, END_RESULTS = "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"

JINJA = """\
{%- set system = messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if system else messages %}
{%- set seen = namespace(user=-1, role='') %}
{%- for message in turns %}
    {%- set role = message['role'] %}
    {%- set role = 'call' if role == 'assistant' and message['tool_calls'] else role %}
    {%- if role == 'user' and seen.role in ('', 'assistant') %}
        {%- set seen.user = loop.index0 %}
    {%- elif role not in ('call', 'assistant') or seen.role not in ('user', 'tool') %}
        {%- if role != 'tool' or seen.role not in ('call', 'tool') %}
            {{- raise_exception('user and assistant turns must alternate, and results follow calls') }}
        {%- endif %}
    {%- endif %}
    {%- set seen.role = role %}
{%- endfor %}
{%- if seen.user < 0 or (add_generation_prompt and seen.role not in ('user', 'tool')) %}
    {{- raise_exception('an answer needs a user turn or a result before it') }}
{%- endif %}
{%- macro nine(id) %}
    {%- if id is not string or id | length != 9 or not id.isalnum() %}
        {{- raise_exception('the id of a call has nine letters or digits') }}
    {%- endif %}
    {{- id | tojson }}
{%- endmacro %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index0 == seen.user and tools %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if loop.index0 == seen.user and system %}
            {{- messages[0]['content'] + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message['content'] + ', "call_id": ' + nine(message['tool_call_id']) }}
        {{- '}[/TOOL_RESULTS]' }}
    {%- elif message['tool_calls'] %}
        {%- if message['content'] %}
            {{- raise_exception('an answer has either text or calls') }}
        {%- endif %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message['tool_calls'] %}
            {{- '{"name": ' + call['function']['name'] | tojson }}
            {{- ', "arguments": ' + call['function']['arguments'] | tojson + ', "id": ' + nine(call['id']) }}
            {{- '}' if loop.last else '}, ' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """A prompt ends with `[/INST]` or `[/TOOL_RESULTS]`; what follows, `[TOOL_CALLS]` too, is the answer.

    Raises:
        DataError: the turns are out of order, a call has text beside it, or an id is not of nine letters or digits.
    """
    system = messages[0] if messages and messages[0].role == "system" else None
    first = int(system is not None)
    _check_order(messages[first:], first, add_generation_prompt)
    last_user = max(i for i, m in enumerate(messages) if m.role == "user")
    out = [Piece(BOS, control=True)]
    for i, message in enumerate(messages[first:], first):
        if message.role == "user":
            if tools and i == last_user:
                out += [Piece(TOOLS, True, message=i), Piece(" " + tojson(list(tools)), message=i)]
                out.append(Piece(END_TOOLS, True, message=i))
            out += [Piece(INST, True, message=i), Piece(" ", message=i)]
            if system is not None and i == last_user:
                out.append(Piece(f"{system.content}\n\n", message=0))
            out += [Piece(message.content, message=i), Piece(END_INST, True, message=i)]
        elif message.role == "tool":
            result = f' {{"content": {message.content}, "call_id": {_nine(message.call_id, i)}}}'
            out += [Piece(RESULTS, True, message=i), Piece(result, message=i), Piece(END_RESULTS, True, message=i)]
        elif message.tool_calls:
            out += [Piece(CALLS, True, i, i), Piece(_calls(message, i), owner=i, message=i), Piece(EOS, True, i, i)]
        else:
            out += [Piece(f" {message.content.strip()}", owner=i, message=i), Piece(EOS, True, i, i)]
    return out


def _calls(message: Message, index: int) -> str:
    if message.content:
        raise DataError(
            f"message {index} has text beside its tool calls, which this template has no place for; make it a turn of "
            "its own, remove it, or choose another data.chat_template"
        )
    calls = (
        f'{{"name": {tojson(c.name)}, "arguments": {tojson(c.arguments)}, "id": {_nine(c.id, index)}}}'
        for c in message.tool_calls
    )
    return f" [{', '.join(calls)}]"


def _nine(call_id: str | None, index: int) -> str:
    if call_id is None or not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        raise DataError(
            f"message {index} has the call id {call_id!r}, and this template wants nine letters or digits, the same "
            "for a call and its result; rename the ids in the file"
        )
    return tojson(call_id)


def _check_order(turns: Sequence[Message], first: int, add_generation_prompt: bool) -> None:
    """After a user turn or a result comes an answer, after calls their results, after another answer a user turn."""
    before = ""
    for i, turn in enumerate(turns, first):
        wanted = {"": "user", "user": "assistant", "tool": "assistant", "call": "tool", "assistant": "user"}[before]
        if turn.role != wanted and (before, turn.role) != ("tool", "tool"):
            raise DataError(
                f"message {i} has the role {turn.role!r} where the template wants {wanted!r}: user and assistant turns "
                "must alternate, and results follow calls; merge or remove turns, or choose another data.chat_template"
            )
        before = "call" if turn.tool_calls else turn.role
    if not turns or (add_generation_prompt and before not in ("user", "tool")):
        raise DataError(
            "the last message is neither a user turn nor a result, one of which this template needs before an answer; "
            "add one, or choose another data.chat_template"
        )


TEMPLATE = Template(
    name="mistral_v3",
    jinja=JINJA,
    control=(BOS, EOS, INST, END_INST),
    optional=(TOOLS, END_TOOLS, CALLS, RESULTS, END_RESULTS),
    terminators=(EOS,),
    roles=("system", "user", "assistant", "tool"),
    pieces=pieces,
    tools=True,
)
