"""What a recipe says about the chat template, and a tokenizer -> the template that renders its chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuner.data.foreign import foreign_template
from tuner.data.templates import TEMPLATES, Template, lacking, missing_controls, recognise
from tuner.errors import ModelError, RecipeError
from tuner.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def resolve_template(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    options: Mapping[str, Any] | None = None,
    control_tokens: Mapping[str, str] | None = None,
) -> Template:
    """The template called `name`; `auto` takes the tokenizer's own.

    An own one that is known is rendered by us; an unknown one is rendered as it is (see `tuner.data.foreign`).

    Raises:
        RecipeError: there is no such template, or it has no such option or control token.
        ModelError: the tokenizer has no template, or lacks a control token of the one asked for.
    """
    options, control_tokens = options or {}, control_tokens or {}
    if name != "auto":
        if name not in TEMPLATES:
            known = ", ".join(("auto", *TEMPLATES))
            raise RecipeError(f"data.chat_template: unknown '{name}'{did_you_mean(name, TEMPLATES)}; known: {known}")
        template = TEMPLATES[name].with_options(options).with_control_tokens(control_tokens)
    else:
        template = _own_template(tokenizer, options, control_tokens)
    if missing := missing_controls(template, tokenizer):
        raise lacking(template, missing, tokenizer)
    return template


def _own_template(
    tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any], control_tokens: Mapping[str, str]
) -> Template:
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is None:
        fits = [t.name for t in TEMPLATES.values() if not missing_controls(t, tokenizer)]
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; set data.chat_template to one it has the "
            f"control tokens for: {', '.join(fits)}"
        )
    if not isinstance(own, str):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} is a {type(own).__name__}, not a text; mend its "
            "tokenizer_config.json, or set data.chat_template to a template of tuner"
        )
    found = recognise(own)
    if found is not None:
        settings = {**found.options, **options}
        renamed = {**found.renamed, **control_tokens}
        return TEMPLATES[found.name].with_options(settings).with_control_tokens(renamed)
    key = "date_string" if list(options) == ["date_string"] else "template_options"
    for name, given in ((key, options), ("control_tokens", control_tokens)):
        if given:
            raise RecipeError(
                f"data.{name}: the chat template of {tokenizer.name_or_path} is its own, which has none that we could "
                f"set; remove the key, or name a data.chat_template"
            )
    return foreign_template(own, tokenizer)
