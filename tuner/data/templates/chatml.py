"""Messages -> ChatML, with tools as Hermes and Qwen2.5 write them.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi<|im_end|>

A Llama model has seen BOS before every document, so BOS comes first if the tokenizer has one; where a tokenizer names
`<|im_start|>` itself as its BOS, the first turn already begins with it.

Tools are published with NousResearch's Hermes function calling and in the template of the Qwen2.5 checkpoints: schemas
in the system turn, calls as `<tool_call>` in the answer, beside its text if there is any, and the results that follow
each other as `<tool_response>` in one user turn. Without a system message the system turn holds the schemas alone. The
tags are control tokens for a tokenizer that has them, as theirs do in part, and text for any other. No call has an id,
so results must come in the order of the calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template, tojson
from tuner.errors import DataError
from tuner.types import Message

START, END = "<|im_start|>", "<|im_end|>"
TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

JINJA = """\
{%- if bos_token and bos_token != '<|im_start|>' %}
    {{- bos_token }}
{%- endif %}
{%- set turns = messages %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
        {%- set turns = messages[1:] %}
    {%- endif %}
    {{- BEFORE_TOOLS }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- AFTER_TOOLS + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message['tool_calls'] %}
        {{- '<|im_start|>assistant' }}
        {%- if message['content'] %}
            {{- '\\n' + message['content'] }}
        {%- endif %}
        {%- for call in message['tool_calls'] %}
            {{- '\\n<tool_call>\\n{"name": ' + call['function']['name'] | tojson }}
            {{- ', "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
JINJA = JINJA.replace("BEFORE_TOOLS", repr(_BEFORE_TOOLS)).replace("AFTER_TOOLS", repr(_AFTER_TOOLS))


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """The newline after a turn's end belongs to no answer.

    Raises:
        DataError: results do not come in the order of the calls.
    """
    _check_results(messages)
    out = [Piece(BOS, control=True)]
    if tools and not (messages and messages[0].role == "system"):
        out += [Piece(START, True, message=0), Piece("system\n", message=0), *_schemas(tools)]
        out += [Piece(END, True, message=0), Piece("\n", message=0)]
    for i, message in enumerate(messages):
        if message.role == "tool":
            out += _result(messages, i)
            continue
        out += [Piece(START, True, message=i), Piece(message.role + "\n", message=i)]
        if message.role == "assistant":
            out += [*_answer(message, i), Piece(END, True, i, i)]
        else:
            out.append(Piece(message.content, message=i))
            if tools and i == 0 and message.role == "system":
                out += [Piece("\n\n", message=0), *_schemas(tools)]
            out.append(Piece(END, True, message=i))
        out.append(Piece("\n", message=i))
    if add_generation_prompt:
        out += [Piece(START, True), Piece("assistant\n")]
    return out


def _tagged(text: str, message: int, owner: int | None = None) -> list[Piece]:
    """A text of the format itself, whose tags may be control tokens; never one that a user wrote."""
    parts = re.split(f"({'|'.join(TAGS)})", text)
    return [Piece(part, part in TAGS, owner, message) for part in parts if part]


def _schemas(tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
    schemas = "".join(f"\n{tojson(tool)}" for tool in tools)
    return [*_tagged(_BEFORE_TOOLS, 0), Piece(schemas, message=0), *_tagged(_AFTER_TOOLS, 0)]


def _answer(message: Message, i: int) -> list[Piece]:
    """The text of an answer and its calls, each after a newline."""
    out = [Piece(message.content, owner=i, message=i)] if message.content or not message.tool_calls else []
    for call in message.tool_calls:
        body = f'\n{{"name": {tojson(call.name)}, "arguments": {tojson(call.arguments)}}}\n'
        out += _tagged("\n<tool_call>" if out else "<tool_call>", i, i)
        out += [Piece(body, owner=i, message=i), *_tagged("</tool_call>", i, i)]
    return out


def _result(messages: Sequence[Message], i: int) -> list[Piece]:
    """A result of a call, with the beginning or the end of the user turn if it is the first or last in it."""
    first = i == 0 or messages[i - 1].role != "tool"
    last = i + 1 == len(messages) or messages[i + 1].role != "tool"
    out = [Piece(START, True, message=i), Piece("user", message=i)] if first else []
    out += [*_tagged("\n<tool_response>", i), Piece(f"\n{messages[i].content}\n", message=i)]
    out += _tagged("</tool_response>", i)
    return [*out, Piece(END, True, message=i), Piece("\n", message=i)] if last else out


def _check_results(messages: Sequence[Message]) -> None:
    """Refuses results in another order than their calls, which nothing in the text would show."""
    expected: list[str | None] = []
    for i, message in enumerate(messages):
        if message.role != "tool":
            expected = [call.id for call in message.tool_calls]
        elif message.call_id is not None and None not in expected:
            wanted = expected.pop(0) if expected else None
            if message.call_id != wanted:
                raise DataError(
                    f"message {i} answers the call {message.call_id!r} where the one of {wanted!r} is due: this "
                    "template writes no ids, so put the results in the order of the calls"
                )


TEMPLATE = Template(
    name="chatml",
    jinja=JINJA,
    control=(START, END),
    tags=TAGS,
    terminators=(END,),
    roles=("system", "user", "assistant", "tool"),
    pieces=pieces,
    tools=True,
    # our own text before it had tools
    also=frozenset({"c7ccdf9cf6f91e4e8319d8a13c9fa889d9ee9b41f9bf97416543b96b79213112"}),
)
