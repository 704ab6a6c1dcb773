"""A recipe and what pydantic found wrong -> one sentence with place, key, value and remedy.

Also the rules that no single field can state: values that contradict each other, and keys that would have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tuner.errors import RecipeError
from tuner.recipe.schema import SECTIONS, DataSource, Recipe
from tuner.recipe.yaml12 import Node
from tuner.registry import did_you_mean

PREFERENCE = ("reward", "dpo")  # stages whose rows are compared answers
_TOP_KEYS = tuple(Recipe.model_fields)
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "string_too_short": "some text",
    "too_short": "at least one entry",
    "none_required": "nothing",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}
# What other tools call our keys.
_ELSEWHERE = {
    "alpha": "adapter.lora_alpha",
    "base_model": "model.name_or_path",
    "bf16": "model.dtype",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "epochs": "train.num_train_epochs",
    "eval_steps": "eval.steps",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "train.microbatch_tokens (batch_size is the whole optimizer step)",
    "gradient_checkpointing": "train.activation_checkpointing",
    "lora_r": "adapter.r",
    "lr": "train.learning_rate",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.name_or_path",
    "num_epochs": "train.num_train_epochs",
    "per_device_train_batch_size": "train.batch_size (the whole optimizer step)",
    "rank": "adapter.r",
    "sequence_len": "data.max_length",
    "template": "data.chat_template",
}


def show(value: Any) -> str:
    """A value as a person would recognise it, cut to 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, tuple):
        value = list(value)
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def find(root: Node, path: Sequence[int | str]) -> Node:
    """The deepest node on `path`; steps that name no node (pydantic's union tags, shorthands) are passed over."""
    node = root
    for step in path:
        if isinstance(node.value, dict) and step in node.value:
            node = node.value[str(step)]
        elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
    return node


def dotted(path: Sequence[int | str]) -> str:
    """`data.train[1].path` from the place of a pydantic error, without the tags of the unions on the way."""
    text = ""
    for i, step in enumerate(path):
        if isinstance(step, int):
            text += f"[{step}]"
        elif i < 2 or isinstance(path[i - 1], int) or path[i - 1] == "columns":
            text += f".{step}" if text else step
    return text


def first_error(error: ValidationError, root: Node) -> RecipeError:
    """The first mistake in the order of the file, as one sentence."""
    groups: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(dotted(detail["loc"]), []).append(detail)
    rank = {key: (find(root, d[0]["loc"]).line, d[0]["type"] == "missing") for key, d in groups.items()}
    key = min(groups, key=lambda k: (rank[k][1], rank[k][0]))
    details = groups[key]
    node = find(root, details[0]["loc"])
    if details[0]["type"] == "extra_forbidden":
        return unknown_key(node.place, details[0]["loc"])
    if details[0]["type"] == "missing":
        place = node.place if len(details[0]["loc"]) > 1 and node is not root else root.place
        return RecipeError(f"{place}: {key} is missing and has no default; add it")
    wanted = " or ".join(dict.fromkeys(_wanted(d) for d in details))
    value = details[0]["input"]
    hint = did_you_mean(value, re.findall(r"'([^']+)'", wanted)) if isinstance(value, str) else ""
    return RecipeError(f"{node.place}: {key}: expected {wanted}, got {show(value)}{hint}")


def _wanted(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return "one of " + ", ".join(
            f"'{w}'" for w in re.sub(r"\[.*", "N", context["pattern"].strip("^()$")).split("|")
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]:.10g}"
    if kind == "model_type" and isinstance(detail["loc"][-1], int):
        return "a path, a Hub id or a mapping with a path"
    return _WANTED.get(kind, detail["msg"].lower())


def unknown_key(place: str, path: Sequence[int | str]) -> RecipeError:
    """An unknown key, with the nearest key of its section and the section that has a key of this name."""
    name, section = str(path[-1]), path[0]
    if len(path) > 2:
        known: Sequence[str] = tuple(DataSource.model_fields)
    else:
        known = tuple(SECTIONS[str(section)].model_fields) if len(path) == 2 else _TOP_KEYS
    homes = [home for home, model in SECTIONS.items() if name in model.model_fields and home != section]
    near = did_you_mean(name, known)
    if name in _ELSEWHERE:
        hint = f": it is called {_ELSEWHERE[name]} here"
    elif section == "data" and len(path) == 2 and name in DataSource.model_fields:
        entry = "path: ..." if name == "path" else f"path: ..., {name}: ..."
        hint = f": '{name}' belongs to one source, as in data.train: [{{{entry}}}]"
    elif near and homes:
        hint = f" (did you mean {near.split(' mean ')[1][:-2]} or '{homes[0]}.{name}'?)"
    elif homes:
        hint = f": '{name}' belongs to section '{homes[0]}', as {homes[0]}.{name}"
    else:
        hint = near or _any_section(name) or f"; known here: {', '.join(known)}"
    return RecipeError(f"{place}: unknown key '{dotted(path)}'{hint}")


def _any_section(name: str) -> str:
    """The nearest key of any section, for a misspelt key that also stands in the wrong section."""
    homes = {key: f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    near = did_you_mean(name, [key for key in homes if abs(len(key) - len(name)) <= 2 and len(key) > 2])
    return re.sub(r"'(.*)'", lambda m: f"'{homes[m[1]]}'", near)


def check_rules(recipe: Recipe, root: Node) -> None:
    """Refuses a recipe whose values contradict each other, or that sets a key without effect."""
    for key, message in _conflicts(recipe, root):
        raise RecipeError(f"{find(root, key.split('.')).place}: {key}: {message}")
    for key, reason in idle_keys(recipe).items():
        section, name = key.split(".")
        keys = root.value.get(section) if isinstance(root.value, dict) else None
        if keys is not None and isinstance(keys.value, dict) and name in keys.value:
            raise RecipeError(f"{keys.value[name].place}: {key} has no effect: {reason}; remove it")


def _conflicts(recipe: Recipe, root: Node) -> Iterator[tuple[str, str]]:
    model, adapter, data, train, ev = recipe.model, recipe.adapter, recipe.data, recipe.train, recipe.eval
    near_type = [key for key in recipe.loss.parameters if did_you_mean(key, ["type"]) and len(key) <= len("type") + 1]
    if near_type:
        yield f"loss.{near_type[0]}", "unknown key (did you mean 'type'?)"
    if model.load_in_4bit and adapter is None:
        yield "model.load_in_4bit", "4-bit weights cannot be trained; add an adapter section, or set it to false"
    if model.load_in_4bit and adapter is not None and str(adapter.init_lora_weights).startswith("pissa"):
        remedy = "PiSSA changes the base, and a 4-bit base cannot be changed; set it to true, or load_in_4bit to false"
        yield "adapter.init_lora_weights", remedy
    if adapter is not None and not adapter.target_modules:
        yield "adapter.target_modules", "names no module to adapt; set it to all-linear, or leave it out"
    if not train.output_dir.isprintable():
        yield "train.output_dir", f"{show(train.output_dir)} holds a control character; give a plain path"
    is_text = [(source.format or data.format) == "text" for source in data.train]
    if data.overlong == "split" and not any(is_text):
        yield "data.overlong", "split is for text; set data.format: text, or choose error, drop or truncate"
    if data.parse_control_tokens and not any(is_text):
        yield "data.parse_control_tokens", "only text rows may carry control tokens; set data.format: text"
    if all(is_text) and data.train_on != "all":
        yield "data.train_on", f"text has no assistant turns, so {data.train_on} trains nothing; set it to all"
    if data.ghost_attention and data.train_on == "all":
        yield (
            "data.ghost_attention",
            "trains the last answers only, and data.train_on: all trains everything; choose one",
        )
    if data.date_string is not None and "date_string" in data.template_options:
        yield "data.template_options", "date_string is set in data.date_string too; say it once"
    if recipe.stage in PREFERENCE:
        if data.train_on == "all":
            yield "data.train_on", f"{recipe.stage} compares answers, so prompts are never trained; set it to assistant"
        if adapter is not None and adapter.lora_dropout:
            yield "adapter.lora_dropout", "policy and reference may differ by nothing but what is learned; set it to 0"
    if recipe.stage == "reward" and data.overlong == "truncate":
        yield "data.overlong", "a reward is read at the end of an answer, which truncate cuts off; set it to drop"
    given = root.value.get("train") if isinstance(root.value, dict) else None
    if train.batch_unit == "tokens" and not (given and isinstance(given.value, dict) and "batch_size" in given.value):
        yield "train.batch_unit", "with tokens, train.batch_size must be given too (tokens an optimizer step)"
    if ev.metric == "exact_match" and ev.questions is None:
        yield "eval.metric", "exact_match is measured on questions; set eval.questions to a JSONL file"
    for key, on in (("load_best", ev.load_best), ("early_stopping_patience", ev.early_stopping_patience is not None)):
        if on and ev.steps is None:
            yield f"eval.{key}", "needs evaluations during training; set eval.steps"
        if on and ev.metric == "loss" and data.eval is None:
            yield f"eval.{key}", "goes by the held-out loss; set data.eval, or eval.metric: exact_match"


def idle_keys(recipe: Recipe) -> Mapping[str, str]:
    """Dotted keys that have no effect in this recipe -> why. Setting one is refused, and `dump` leaves them out."""
    idle: dict[str, str] = {}
    if recipe.stage != "dpo":
        idle |= dict.fromkeys(("reference.model", "reference.cache"), "only `tuner dpo` compares with a reference")
        idle["data.train_control_tokens"] = "only `tuner dpo` may leave them out: without them nothing teaches to stop"
        idle["eval.prompts"] = "only `tuner dpo` answers held-out prompts"
    if recipe.stage == "reward":
        reason = "a reward model writes no text"
        idle |= {f"generate.{key}": reason for key in SECTIONS["generate"].model_fields}
        idle |= dict.fromkeys(("eval.questions", "eval.samples"), reason)
        idle["data.train_on"] = "a reward is read at the end of an answer, whatever stands before it"
    if not recipe.model.load_in_4bit:
        idle |= dict.fromkeys(
            ("model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant"), "model.load_in_4bit is false"
        )
    if recipe.adapter is not None:
        idle["train.param_dtype"] = "adapters are always kept in float32"
        if recipe.adapter.path is not None:
            given = [key for key in SECTIONS["adapter"].model_fields if key != "path"]
            idle |= {f"adapter.{key}": "the adapter at adapter.path brings its own" for key in given}
    if recipe.train.warmup_steps is not None:
        idle["train.warmup_ratio"] = "train.warmup_steps is set too"
    if recipe.train.lr_scheduler_type == "constant":
        idle["train.min_lr_ratio"] = "train.lr_scheduler_type is constant"
    if recipe.data.eval is None and recipe.eval.questions is None:
        reason = "there is nothing to evaluate on (set data.eval or eval.questions)"
        idle |= {f"eval.{key}": reason for key in SECTIONS["eval"].model_fields if key != "questions"}
    elif recipe.data.eval is None:
        idle.setdefault("eval.prompts", "there are no held-out rows (set data.eval)")
    elif recipe.eval.questions is None and recipe.stage != "dpo":
        idle["eval.samples"] = "there are no eval.questions"
    if recipe.generate.temperature == 0:
        idle |= dict.fromkeys(("generate.top_k", "generate.top_p"), "generate.temperature is 0, which is greedy")
    return idle
