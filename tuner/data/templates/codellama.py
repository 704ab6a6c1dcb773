"""Messages -> Code Llama: chats as Llama 2's, and code to be infilled (Code Llama, arXiv 2308.12950, section 2.3).

    <s>▁<PRE> def f(▁<SUF>):
        return x▁<MID>x▁<EOT>

A chat is for the 7B, 13B and 34B instruct models; the 70B one has a format of its own. An infilling has the roles
`prefix`, `suffix` and, as the answer, `middle`. It is published as `infilling_prompt_tokens` in generation.py of
Meta's codellama repository: prefix, suffix, middle as above, or with the option `suffix_first`

    <s>▁<PRE>▁<SUF>{suffix}▁<MID>{prefix}{middle}▁<EOT>

The paper trains on both orders alike. A SentencePiece tokenizer puts its blank before the prefix (the blank after
`▁<PRE>` above), and none before suffix and middle. Where prefix and middle meet, the ids are cut, as they are when the
model is asked for the middle; the paper tokenises the two together there.

A chat needs no infilling tokens. A tokenizer of another kind may name slots for them in `data.control_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, EOS, Piece, Template, llama2
from tuner.errors import DataError
from tuner.types import Message

PRE, SUF, MID, EOT = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
INFILLING = ("prefix", "suffix", "middle")

_JINJA = """\
{%- if messages[0]['role'] == 'prefix' %}
    {%- if messages | map(attribute='role') | join(' ') not in ('prefix suffix', 'prefix suffix middle') %}
        {{- raise_exception('an infilling has a prefix, a suffix and then the middle') }}
    {%- endif %}
    {{- bos_token + ORDER }}
    {%- if messages | length > 2 %}
        {{- messages[2]['content'] + '▁<EOT>' }}
    {%- endif %}
{%- else -%}
CHAT{%- endif %}
"""


def write(*, suffix_first: bool = False) -> str:
    """The Jinja text with this order of suffix and prefix."""
    if suffix_first:
        order = "'▁<PRE>▁<SUF>' + messages[1]['content'] + '▁<MID>' + messages[0]['content']"
    else:
        order = "'▁<PRE>' + messages[0]['content'] + '▁<SUF>' + messages[1]['content'] + '▁<MID>'"
    return _JINJA.replace("ORDER", order).replace("CHAT", llama2.JINJA)


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    suffix_first: bool = False,
) -> list[Piece]:
    """A prompt to infill ends with `▁<MID>`, or with the prefix if the suffix comes first.

    Raises:
        DataError: the roles are not those of an infilling in order, or of a chat that alternates.
    """
    if not any(m.role in INFILLING for m in messages):
        return llama2.pieces(messages, add_generation_prompt)
    roles = tuple(m.role for m in messages)
    if roles not in (INFILLING[:2], INFILLING) or (add_generation_prompt and roles == INFILLING):
        raise DataError(
            f"the roles are {', '.join(roles)}, but an infilling has a prefix, a suffix and then the middle, and a "
            "prompt no middle yet; put these three in that order, and nothing else"
        )
    # True: the blank that the tokenizer puts before a text; False: none
    before = Piece(messages[0].content, message=0, lead=True)
    after = Piece(messages[1].content, message=1, lead=False)
    pre, suf = Piece(PRE, True, message=0), Piece(SUF, True, message=1)
    mid = Piece(MID, True, message=1)
    out = [Piece(BOS, control=True)]
    out += [pre, suf, after, mid, before] if suffix_first else [pre, before, suf, after, mid]
    if roles == INFILLING:
        out += [Piece(messages[2].content, owner=2, message=2, lead=False), Piece(EOT, True, 2, 2)]
    return out


TEMPLATE = Template(
    name="codellama",
    jinja=write(),
    control=(BOS, EOS),
    optional=(PRE, SUF, MID, EOT),
    terminators=(EOS, EOT),
    roles=(*llama2.TEMPLATE.roles, *INFILLING),
    pieces=pieces,
    write=write,
)
