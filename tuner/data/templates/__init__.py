"""Chat templates: messages -> pieces of text and control tokens. One file here is one template.

Each file defines `TEMPLATE`. Its `jinja` is what is saved with the tokenizer, and renders the very text of its pieces.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tuner.errors import ModelError, RecipeError
from tuner.registry import did_you_mean
from tuner.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Control tokens that the tokenizer names, not the template; the same names as the variables of a Jinja template.
BOS, EOS = "bos_token", "eos_token"


class Piece(NamedTuple):
    """A control token, or text that is tokenised as one unit and can never hold one."""

    text: str
    control: bool = False
    owner: int | None = None  # index of the message whose answer (content or terminator) this is
    message: int | None = None  # index of the message that it belongs to at all, headers too


class PiecesFn(Protocol):
    """Messages -> pieces; an answer is cut from its header exactly where the generation prompt ends."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]: ...


@dataclass(frozen=True)
class Template:
    """A chat template."""

    name: str
    jinja: str  # saved with the tokenizer
    control: tuple[str, ...]  # control tokens that the tokenizer must have
    terminators: tuple[str, ...]  # control tokens that end an answer
    roles: tuple[str, ...]
    pieces: PiecesFn
    also: frozenset[str] = frozenset()  # fingerprints of other Jinja texts that render chats in the same way

    def recognises(self, jinja: str) -> bool:
        """Whether `jinja` is known to render conversations as this template does."""
        return fingerprint(jinja) in self.also | {fingerprint(self.jinja)}


def resolve_template(name: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template called `name`; `auto` recognises the tokenizer's own.

    Raises:
        RecipeError: there is no such template.
        ModelError: the tokenizer has no template, an unknown one, or lacks a control token of the one asked for.
    """
    if name != "auto":
        if name not in TEMPLATES:
            known = ", ".join(("auto", *TEMPLATES))
            raise RecipeError(f"data.chat_template: unknown '{name}'{did_you_mean(name, TEMPLATES)}; known: {known}")
        template = TEMPLATES[name]
    else:
        own = _own_template(tokenizer)
        fits = [t for t in TEMPLATES.values() if not missing_controls(t, tokenizer)]
        remedy = f"set data.chat_template to one it has the control tokens for: {', '.join(t.name for t in fits)}"
        if own is None:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; {remedy}")
        found = next((t for t in TEMPLATES.values() if t.recognises(own)), None)
        if found is None:
            raise ModelError(
                f"the chat template of the tokenizer of {tokenizer.name_or_path} is none that tuner knows "
                f"({', '.join(TEMPLATES)}), so its mask would be a guess; {remedy}"
            )
        template = found
    if missing := missing_controls(template, tokenizer):
        raise ModelError(
            f"chat_template '{template.name}' needs {', '.join(missing)}, which the tokenizer of "
            f"{tokenizer.name_or_path} does not have as control tokens; choose another data.chat_template, "
            "or a checkpoint that has them"
        )
    return template


def control_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Every added token of the tokenizer by its text, and `bos_token` and `eos_token` where it has them."""
    ids = {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items()}
    for name, index in ((BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)):
        if index is not None:
            ids[name] = int(index)
    return ids


def missing_controls(template: Template, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Control tokens of the template that the tokenizer lacks."""
    have = control_ids(tokenizer)
    return [name for name in template.control if name not in have]


def fingerprint(jinja: str) -> str:
    """sha256 of a Jinja text up to what cannot change its output: blanks inside tags and the spelling of strings."""
    text = jinja.replace("\r\n", "\n").removesuffix("\n")
    text = re.sub(r"(\{[{%]-?)(.*?)(-?[%}]\})", lambda m: m[1] + _squeeze(m[2]) + m[3], text, flags=re.DOTALL)
    return hashlib.sha256(text.encode()).hexdigest()


def _squeeze(tag: str) -> str:
    """The inside of a tag without blanks that separate nothing; strings keep theirs, in one spelling."""
    parts = re.split(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", tag, flags=re.DOTALL)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = repr(re.sub(r"\\.", lambda m: "\n" if m[0] == r"\n" else m[0], part[1:-1], flags=re.DOTALL))
        else:
            parts[i] = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", part))
    return "".join(parts).strip()


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


TEMPLATES: dict[str, Template] = {}

for _module in pkgutil.iter_modules(__path__):  # alphabetical; this is what makes a template one file
    _template: Template = importlib.import_module(f"{__name__}.{_module.name}").TEMPLATE
    TEMPLATES[_template.name] = _template
