"""Headers and turns of the Llama 3 family, and Llama 3.1's system turn, tools and calls -> pieces and Jinja.

The format is published in Meta's llama-models repository (models/llama3_1/prompt_format.md) and in the checkpoints' own
templates, whose rendering this is, byte for byte:

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Environment: ipython
    Cutting Knowledge Date: December 2023
    Today Date: 26 Jul 2024

    Use tools.<|eot_id|><|start_header_id|>user<|end_header_id|>

    (how to call, the schemas) What is the weather in Paris?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    {"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

    "{\\"celsius\\": 21}"<|eot_id|>

The system turn is there without a system message too; it is then the first message's. A result is written as a JSON
string. Ids of calls and names of results have no place in the format. Where Meta's templates drop or change something
silently (text beside a call, a first turn that is not the user's), ours refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, tojson
from tuner.errors import DataError
from tuner.types import Message, ToolCall

START, END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
EOM, PYTHON = "<|eom_id|>", "<|python_tag|>"
DATE = "26 Jul 2024"  # of the checkpoints' templates; never today's, which would change the ids from day to day
ROLES = ("system", "user", "assistant", "tool")

_SHAPE = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
SYSTEM_GUIDE = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    + _SHAPE
)
USER_GUIDE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n" + _SHAPE
)


def header(role: str, message: int | None = None, text: str = "") -> list[Piece]:
    """The header of a turn, and the text that follows it as one with its newlines."""
    return [
        Piece(START, True, message=message),
        Piece(role, message=message),
        Piece(END, True, message=message),
        Piece("\n\n" + text, message=message),
    ]


def turn(role: str, message: int, text: str) -> list[Piece]:
    """A turn that is no answer."""
    return [*header(role, message, text), Piece(EOT, True, message=message)]


def answer(message: int, text: str) -> list[Piece]:
    """An assistant's turn; its text and terminator are the answer."""
    return [
        *header("assistant", message),
        Piece(text, owner=message, message=message),
        Piece(EOT, True, message, message),
    ]


def tool_pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]],
    date_string: str,
    tools_in_user_message: bool,
    builtin_tools: Sequence[str] | None = None,
) -> list[Piece]:
    """The pieces of a chat in Llama 3.1's format.

    Args:
        date_string: what the system turn calls today.
        tools_in_user_message: whether the tools are in the first user turn, not in the system turn.
        builtin_tools: tools that are called in Python's way; given at all, even as an empty list, it turns Meta's
            ipython mode on, in which every call ends with `<|eom_id|>`.

    Raises:
        DataError: the format has no place for something in the messages.
    """
    first = int(bool(messages) and messages[0].role == "system")
    schemas = "".join(tojson(tool, indent=4) + "\n\n" for tool in tools)
    system = "Environment: ipython\n" if tools or builtin_tools is not None else ""
    if builtin_tools is not None:
        system += "Tools: " + ", ".join(t for t in builtin_tools if t != "code_interpreter") + "\n\n"
    system += f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
    if tools and not tools_in_user_message:
        system += SYSTEM_GUIDE + schemas
    if first:
        system += messages[0].content.strip()
    out = [Piece(BOS, control=True), *turn("system", 0, system)]
    in_user = bool(tools) and tools_in_user_message
    if in_user and [m.role for m in messages[first : first + 1]] != ["user"]:
        raise DataError(
            "the tools go into the first turn after the system message, which must be the user's; add one, or set "
            "data.template_options: {tools_in_user_message: false}"
        )
    for i, message in enumerate(messages[first:], first):
        if message.tool_calls:
            out += [*header("assistant", i), *_call(message, i, builtin_tools)]
        elif message.role == "assistant":
            out += answer(i, message.content.strip())
        elif message.role == "tool":
            out += turn("ipython", i, tojson(message.content))
        else:
            guide = USER_GUIDE + schemas if in_user and i == first else ""
            out += turn(message.role, i, guide + message.content.strip())
    return out + (header("assistant") if add_generation_prompt else [])


def _call(message: Message, index: int, builtin_tools: Sequence[str] | None) -> list[Piece]:
    """The answer that calls a function: the call and its terminator."""
    if len(message.tool_calls) > 1:
        raise DataError(
            f"message {index} makes {len(message.tool_calls)} calls, and this template has one call in a turn; give "
            "each call and its result turns of their own, or choose another data.chat_template"
        )
    if message.content.strip():
        raise DataError(
            f"message {index} has text beside its call ({message.content.strip()[:40]!r}), which this template has no "
            "place for; remove the text, or choose another data.chat_template"
        )
    (call,) = message.tool_calls
    if tojson(call.name) != f'"{call.name}"':
        raise DataError(
            f"message {index} calls {call.name!r}, and this template writes names without escapes; rename the function"
        )
    out: list[Piece] = []
    if builtin_tools is not None and call.name in builtin_tools:
        out += [Piece(PYTHON, True, index, index), Piece(_python(call, index), owner=index, message=index)]
    else:
        text = f'{{"name": "{call.name}", "parameters": {tojson(call.arguments)}}}'
        out.append(Piece(text, owner=index, message=index))
    return [*out, Piece(EOT if builtin_tools is None else EOM, True, index, index)]


def _python(call: ToolCall, index: int) -> str:
    """The call of a built-in tool: `name.call(key="value")`."""
    for key, value in call.arguments.items():
        if not isinstance(value, str):
            raise DataError(
                f"message {index} calls the built-in tool {call.name!r} with {key}={value!r}, and its arguments must "
                "be strings; write it as one"
            )
    return f"{call.name}.call(" + ", ".join(f'{key}="{value}"' for key, value in call.arguments.items()) + ")"


# @SET@ sets the options that the text below reads; @CALL@ writes a call and its terminator
_JINJA = """\
{#- TITLE -#}
@SET@
{%- set system = messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if system else messages %}
{%- if tools and tools_in_user_message and (not turns or turns[0]['role'] != 'user') %}
    {{- raise_exception('the tools go into the first user turn, and there is none at the beginning') }}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
@ENVIRONMENT@
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if tools and not tools_in_user_message %}
    {{- @SYSTEM_GUIDE@ }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{%- if system %}
    {{- messages[0]['content'] | trim }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in turns %}
    {%- if message['tool_calls'] %}
        {%- if message['tool_calls'] | length > 1 %}
            {{- raise_exception('this template has one call in a turn') }}
        {%- elif message['content'] and message['content'] | trim %}
            {{- raise_exception('this template has no place for text beside a call') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0]['function'] %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
@CALL@
    {%- elif message['role'] in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message['content'] | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools and tools_in_user_message %}
            {{- @USER_GUIDE@ }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\\n\\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_ENVIRONMENT = """\
{%- if tools %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}"""
_ENVIRONMENT_WITH_BUILTIN = """\
{%- if tools or builtin_tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{%- if builtin_tools is not none %}
    {{- 'Tools: ' + builtin_tools | reject('equalto', 'code_interpreter') | join(', ') + '\\n\\n' }}
{%- endif %}"""
_JSON_CALL = """\
        {{- '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}' }}"""
_CALL = f"{_JSON_CALL}\n        {{{{- '<|eot_id|>' }}}}"
_CALL_WITH_BUILTIN = f"""\
        {{%- if builtin_tools is not none and call['name'] in builtin_tools %}}
            {{{{- '<|python_tag|>' + call['name'] + '.call(' }}}}
            {{%- for key, value in call['arguments'] | items %}}
                {{{{- key + '="' + value + '"' + ('' if loop.last else ', ') }}}}
            {{%- endfor %}}
            {{{{- ')' }}}}
        {{%- else %}}
    {_JSON_CALL}
        {{%- endif %}}
        {{{{- '<|eot_id|>' if builtin_tools is none else '<|eom_id|>' }}}}"""


def tool_jinja(title: str, **options: Any) -> str:
    """The Jinja text that renders what `tool_pieces` renders, with the options written into it."""
    builtin = "builtin_tools" in options
    parts = {
        "TITLE": title,
        "@SET@": "\n".join(f"{{%- set {name} = {_literal(value)} %}}" for name, value in options.items()),
        "@ENVIRONMENT@": _ENVIRONMENT_WITH_BUILTIN if builtin else _ENVIRONMENT,
        "@CALL@": _CALL_WITH_BUILTIN if builtin else _CALL,
        "@SYSTEM_GUIDE@": _literal(SYSTEM_GUIDE),
        "@USER_GUIDE@": _literal(USER_GUIDE),
    }
    text = _JINJA
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


def _literal(value: Any) -> str:
    """A value as Jinja writes it: as JSON does, but `none`."""
    return "none" if value is None else tojson(value)
