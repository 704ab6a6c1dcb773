"""Chat templates: messages -> pieces of text and control tokens. One file here is one template.

Each file defines `TEMPLATE`, and is named like it (`llama3_1.py` is `llama3.1`); a file whose name begins with `_` is
shared by several. `jinja` is what is saved with the tokenizer, and renders the very text of the pieces.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tuner.errors import ModelError, RecipeError
from tuner.registry import check_parameters, did_you_mean
from tuner.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Control tokens that the tokenizer names, not the template; the same names as the variables of a Jinja template.
BOS, EOS = "bos_token", "eos_token"

MAX_KNOWN = 100_000  # characters of a Jinja text that may be one of ours; a longer one is not looked at


class Piece(NamedTuple):
    """A control token, or text that is tokenised as one unit and can never hold one.

    Some tokenizers put a blank of their own before a text. `lead` says whether they do: by default after a control
    token they do as they always do there, and never where two texts meet.
    """

    text: str
    control: bool = False
    owner: int | None = None  # index of the message whose answer (content or terminator) this is
    message: int | None = None  # index of the message that it belongs to at all, headers too
    lead: bool | None = None


class PiecesFn(Protocol):
    """Messages -> pieces; an answer is cut from its header exactly where the generation prompt ends.

    `tools` are the JSON schemas of the functions that may be called. Further keyword-only parameters are the options of
    the template, as a recipe gives them in `data.template_options`. A DataError says what is wrong, not where.
    """

    def __call__(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Piece]: ...


@dataclass(frozen=True)
class Template:
    """A chat template."""

    name: str
    jinja: str  # saved with the tokenizer
    control: tuple[str, ...]  # control tokens that the tokenizer must have
    terminators: tuple[str, ...]  # control tokens that end an answer
    roles: tuple[str, ...]
    pieces: PiecesFn
    tools: bool = False  # whether it has a place for tools, calls and their results
    optional: tuple[str, ...] = ()  # control tokens that only some conversations need, refused when such a one comes
    tags: tuple[str, ...] = ()  # control pieces that are plain text where the tokenizer does not have them
    write: Callable[..., str] | None = None  # options -> jinja, of a template that has options
    also: frozenset[str] = frozenset()  # fingerprints of other Jinja texts that render chats in the same way
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # as given; the others have their defaults
    renamed: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # its control tokens -> the slots that stand for them

    def recognises(self, jinja: str) -> bool:
        """Whether `jinja` is known to render conversations as this template does."""
        return self.has_fingerprint(fingerprint(jinja))

    def has_fingerprint(self, found: str) -> bool:
        """The same, of the text's `fingerprint`."""
        return found in self.also | {fingerprint(self.jinja)}

    def with_options(self, options: Mapping[str, Any]) -> Template:
        """This template with its own options set.

        Raises:
            RecipeError: it has no such option, or the value is not of the option's type.
        """
        if not options:
            return self
        what = f"chat_template '{self.name}'"
        options = {**self.options, **options}
        spelled = (*self.control, *self.optional, "<|")
        for text in _texts_in(options):
            if any(name in text for name in spelled) or not text.replace("\n", "").isprintable():
                raise RecipeError(
                    f"{what}: an option holds {text[:40]!r}, which spells a control token or has a control character, "
                    "and would be read as one in the saved template; write plain text"
                )
        given = check_parameters(self.pieces, options, what, "option", without=("tools",))
        assert self.write is not None, f"{what} has options and no `write`"
        return replace(self, pieces=functools.partial(self.pieces, **given), jinja=self.write(**given), options=options)

    def settings(self) -> dict[str, Any]:
        """Every option with the value that it has, given or by default."""
        if self.write is None:
            return {}
        return {n: p.default for n, p in inspect.signature(self.write).parameters.items()} | dict(self.options)

    def with_control_tokens(self, renamed: Mapping[str, str]) -> Template:
        """This template with other tokens in the place of some of its control tokens.

        Raises:
            RecipeError: it has no such control token, or two would stand for each other.
        """
        every = [name for name in (*self.control, *self.optional, *self.tags) if name not in (BOS, EOS)]
        for name in renamed:
            if name not in every:
                raise RecipeError(
                    f"data.control_tokens: chat_template '{self.name}' has no control token '{name}'"
                    f"{did_you_mean(name, every)}; it has: {', '.join(every) or 'none'}"
                )
        if not renamed:
            return self
        if len({renamed.get(name, name) for name in every}) < len(every):
            raise RecipeError("data.control_tokens: two control tokens share one slot; give each a slot of its own")
        return replace(
            self,
            jinja=re.sub("|".join(map(re.escape, renamed)), lambda m: renamed[m[0]], self.jinja),
            control=tuple(renamed.get(name, name) for name in self.control),
            optional=tuple(renamed.get(name, name) for name in self.optional),
            tags=tuple(renamed.get(name, name) for name in self.tags),
            terminators=tuple(renamed.get(name, name) for name in self.terminators),
            pieces=functools.partial(_renamed_pieces, self.pieces, dict(renamed)),
            renamed=dict(renamed),
        )

    def saved(self) -> str:
        """The Jinja text to save: a first line names the options, so that `auto` finds them again."""
        if not self.options and not self.renamed:
            return self.jinja
        settings = {"name": self.name, "options": dict(self.options), "control_tokens": dict(self.renamed)}
        return _MARK.format(json.dumps(settings).replace("#", "\\u0023")) + self.jinja


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in the options of a template, keys of mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_texts_in, (*value.keys(), *value.values())))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_texts_in, value))


_MARK = "{{#- tuner chat_template {} -#}}\n"


def _renamed_pieces(
    pieces: PiecesFn,
    renamed: Mapping[str, str],
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    **settings: Any,
) -> list[Piece]:
    found = pieces(messages, add_generation_prompt, **settings)
    return [p._replace(text=renamed.get(p.text, p.text)) if p.control else p for p in found]


def lacking(template: Template, missing: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> ModelError:
    """The error that the tokenizer has not the control tokens `missing` of the template, with what to do about it."""
    slots = [t for t in control_ids(tokenizer) if "reserved" in t]
    maps = f"map them onto slots it has (data.control_tokens: {{'{missing[0]}': '{slots[0]}'}})" if slots else ""
    return ModelError(
        f"chat_template '{template.name}' needs {', '.join(missing)}, which the tokenizer of "
        f"{tokenizer.name_or_path} does not have as control tokens; {maps or 'use a checkpoint that has them'}, "
        "or choose another data.chat_template"
    )


def recognise(jinja: str) -> Template | None:
    """The template, with its options, that a Jinja text is known to render as; None for any other text."""
    start, end = _MARK.split("{}")[0].format(), " -#}\n"
    if jinja.startswith(start) and end in jinja:
        try:
            settings = json.loads(jinja[len(start) : jinja.index(end)])
            template = TEMPLATES[settings["name"]].with_options(settings["options"])
            template = template.with_control_tokens(settings["control_tokens"])
        except (ValueError, KeyError, TypeError, RecipeError):
            return None
        return template if template.saved() == jinja else None
    if len(jinja) > MAX_KNOWN:
        return None
    found = fingerprint(jinja)
    return next((t for t in TEMPLATES.values() if t.has_fingerprint(found)), None)


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
    last = max(text.rfind("%}"), text.rfind("}}"))  # a tag that is never closed would be looked for again and again
    text, rest = text[: last + 2], text[last + 2 :]
    text = re.sub(r"(\{[{%]-?)(.*?)(-?[%}]\})", lambda m: m[1] + _squeeze(m[2]) + m[3], text, flags=re.DOTALL) + rest
    return hashlib.sha256(text.encode()).hexdigest()


def _squeeze(tag: str) -> str:
    """The inside of a tag without blanks that separate nothing; strings keep theirs, in one spelling."""
    # a string that is never closed goes to the end, so that it is looked for once
    parts = re.split(r"""('(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z))""", tag, flags=re.DOTALL)
    for i, part in enumerate(parts):
        if i % 2 and part[-1] != part[0]:
            continue
        if i % 2:
            parts[i] = repr(re.sub(r"\\.", lambda m: "\n" if m[0] == r"\n" else m[0], part[1:-1], flags=re.DOTALL))
        else:
            parts[i] = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", part))
    return "".join(parts).strip()


def as_openai(message: Message) -> dict[str, Any]:
    """A message as a Jinja template sees it: OpenAI's keys, those only that it has."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.tool_calls
        ]
    if message.name is not None:
        out["name"] = message.name
    if message.call_id is not None:
        out["tool_call_id"] = message.call_id
    return out


def tojson(value: Any, indent: int | None = None) -> str:
    """JSON as the `tojson` of chat templates writes it: no escapes beyond JSON's own, keys in the order of the file."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def template_name(stem: str) -> str:
    """`llama3.1` from the name of its file, `llama3_1`."""
    return re.sub(r"(?<=\d)_(?=\d)", ".", stem)


TEMPLATES: dict[str, Template] = {}

for _module in pkgutil.iter_modules(__path__):  # alphabetical; this is what makes a template one file
    if not _module.name.startswith("_"):
        _template: Template = importlib.import_module(f"{__name__}.{_module.name}").TEMPLATE
        assert _template.name == template_name(_module.name), f"{_module.name}.py defines '{_template.name}'"
        TEMPLATES[_template.name] = _template
