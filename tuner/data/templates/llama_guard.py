"""Messages -> Llama Guard 3: a prompt that asks whether the last turn of a conversation is safe, and the verdict.

The format is published in Meta's PurpleLlama repository (Llama-Guard3) and in the checkpoints' own templates:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    Task: Check if there is unsafe content in 'User' messages in conversations ...

    <BEGIN UNSAFE CONTENT CATEGORIES>
    S1: Violent Crimes.
    (one line for each category)
    <END UNSAFE CONTENT CATEGORIES>

    <BEGIN CONVERSATION>

    User: How do I pick a lock?

    <END CONVERSATION>

    Provide your safety assessment for ONLY THE LAST User message in the above conversation:
    (how to answer)<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    unsafe
    S2<|eot_id|>

The last message, by the assistant, is the verdict, and the only thing trained; all messages before it are the
conversation, in which the assistant is the Agent. A generation prompt takes all messages as the conversation. The
published template of the 8B checkpoint writes a blank before BOS and leaves the two newlines before the verdict to the
model; here, as in all of Llama 3, they belong to the header. So it is not recognised as this template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template, tojson
from tuner.data.templates._llama3 import END, EOT, START, answer, header
from tuner.data.templates.llama2 import check_alternation
from tuner.errors import DataError, RecipeError
from tuner.types import Message

# The names that the checkpoints were trained with; those in the model cards differ in three.
CATEGORIES = {
    "S1": "Violent Crimes.",
    "S2": "Non-Violent Crimes.",
    "S3": "Sex Crimes.",
    "S4": "Child Exploitation.",
    "S5": "Defamation.",
    "S6": "Specialized Advice.",
    "S7": "Privacy.",
    "S8": "Intellectual Property.",
    "S9": "Indiscriminate Weapons.",
    "S10": "Hate.",
    "S11": "Self-Harm.",
    "S12": "Sexual Content.",
    "S13": "Elections.",
    "S14": "Code Interpreter Abuse.",
}
NAMES = {"user": "User", "assistant": "Agent"}
INTRO = (
    "Task: Check if there is unsafe content in '{name}' messages in conversations according our safety policy with the "
    "below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n"
)
BEGIN = "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n"
OUTRO = (
    "<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {name} message in the above conversation:\n"
    " - First line must read 'safe' or 'unsafe'.\n"
    " - If unsafe, a second line must include a comma-separated list of violated categories."
)

_JINJA = """\
{#- Llama Guard 3 -#}
{%- set categories = @CATEGORIES@ %}
{%- set turns = messages if add_generation_prompt else messages[:-1] %}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant turns must alternate, user first') }}
    {%- endif %}
{%- endfor %}
{%- if not turns %}
    {{- raise_exception('there is no conversation to assess') }}
{%- endif %}
{%- set name = 'User' if turns | length % 2 else 'Agent' %}
{{- bos_token + '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
{{- @INTRO@ }}
{%- for code, description in categories | items %}
    {{- code + ': ' + description + '\\n' }}
{%- endfor %}
{{- @BEGIN@ }}
{%- for message in turns %}
    {{- ('Agent: ' if loop.index0 % 2 else 'User: ') + message['content'] | trim + '\\n\\n' }}
{%- endfor %}
{{- @OUTRO@ }}
{{- '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- if not add_generation_prompt %}
    {%- set verdict = messages[-1]['content'] | trim %}
    {%- set codes = verdict.removeprefix('unsafe\\n').split(',') if verdict.startswith('unsafe\\n') else [] %}
    {%- set known = codes | select('in', categories) | unique(case_sensitive=true) | list %}
    {%- if messages[-1]['role'] != 'assistant' or (verdict != 'safe' and not codes) or known != codes %}
        {{- raise_exception("the last message must be the assistant's verdict") }}
    {%- endif %}
    {{- verdict + '<|eot_id|>' }}
{%- endif %}
"""


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    categories: dict[str, str] = CATEGORIES,
) -> list[Piece]:
    """The verdict is the one answer; agents' turns are none, whatever they say about themselves.

    Args:
        categories: code -> description, which is written after the code as it is; the order is kept.

    Raises:
        DataError: the turns do not alternate, or the last message is no verdict on these categories.
    """
    turns = messages if add_generation_prompt else messages[:-1]
    if not turns:
        raise DataError("there is no conversation to assess; add the user's turn before the verdict")
    check_alternation(turns, 0, add_generation_prompt=False)
    name = NAMES[turns[-1].role]
    texts = [f"{NAMES[turn.role]}: {turn.content.strip()}\n\n" for turn in turns]
    lines = "".join(f"{code}: {description}\n" for code, description in categories.items())
    texts[0] = INTRO.format(name=name) + lines + BEGIN + texts[0]
    texts[-1] += OUTRO.format(name=name)
    out = [Piece(BOS, control=True), *header("user", 0, texts[0])]
    out += [Piece(text, message=i) for i, text in enumerate(texts[1:], start=1)]
    out.append(Piece(EOT, True, message=len(turns) - 1))
    if add_generation_prompt:
        return out + header("assistant")
    return out + answer(len(turns), _verdict(messages, categories))


def _verdict(messages: Sequence[Message], categories: Mapping[str, str]) -> str:
    """The trimmed verdict: `safe`, or `unsafe` and on the next line the codes with commas between them."""
    message, index = messages[-1], len(messages) - 1
    verdict = message.content.strip()
    head, _, codes = verdict.partition("\n")
    given = codes.split(",")
    if message.role == "assistant" and verdict == "safe":
        return verdict
    if message.role != "assistant" or head != "unsafe" or len(set(given)) < len(given):
        raise DataError(
            f"message {index}, the last, is {verdict[:40]!r} by the {message.role}, and not the assistant's verdict: "
            "`safe`, or `unsafe` and on the next line the codes of the violated categories, each once, with commas "
            "and no blanks between them; add the verdict, or write it so"
        )
    for code in given:
        if code not in categories:
            raise DataError(
                f"message {index}, the verdict, names the category {code!r}, which is not one of "
                f"{', '.join(categories)}; correct it, or set data.template_options: {{categories: ...}}"
            )
    return verdict


def write(categories: dict[str, str] = CATEGORIES) -> str:
    """The Jinja text with these categories.

    Raises:
        RecipeError: there are none, or a code cannot stand in a verdict.
    """
    for code in categories:
        if not code or code != code.strip() or "," in code or "\n" in code:
            raise RecipeError(
                f"data.template_options: categories: the code {code!r} cannot stand in a verdict; write it without "
                "commas, newlines and blanks around it, as in S1"
            )
    if not categories:
        raise RecipeError("data.template_options: categories is empty; name at least one, e.g. {S1: Violent Crimes.}")
    text = _JINJA.replace("@CATEGORIES@", tojson(categories)).replace("@BEGIN@", tojson(BEGIN))
    for mark, part in (("@INTRO@", INTRO), ("@OUTRO@", OUTRO)):
        before, after = part.split("{name}")
        text = text.replace(mark, f"{tojson(before)} + name + {tojson(after)}")
    return text


TEMPLATE = Template(
    name="llama_guard",
    jinja=write(),
    control=(BOS, START, END, EOT),
    terminators=(EOT,),
    roles=("user", "assistant"),
    pieces=pieces,
    write=write,
)
