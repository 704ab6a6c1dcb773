"""A recipe file and its overrides -> one frozen, checked `Recipe`. Imports no torch.

`load` refuses what is wrong in one sentence with the place, the key, the value and the remedy, and resolves the paths
that a recipe names. `schema.py` holds the sections, `yaml12.py` reads the text, `rules.py` words what is wrong,
`paths.py` finds files, `shipped.py` copies the recipes that ship.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from tuner.errors import RecipeError
from tuner.recipe import yaml12
from tuner.recipe.paths import find_input, is_hub_id
from tuner.recipe.rules import PREFERENCE, check_rules, find, first_error, idle_keys, show
from tuner.recipe.schema import (
    DEFAULT_LOSSES,
    SECTIONS,
    AdapterSection,
    DataSection,
    DataSource,
    EvalSection,
    GenerateSection,
    LogSection,
    LossSection,
    ModelSection,
    Recipe,
    Scoring,
    TrainSection,
)
from tuner.recipe.shipped import shipped_recipes
from tuner.recipe.yaml12 import Node
from tuner.registry import did_you_mean

__all__ = [
    "PREFERENCE",
    "AdapterSection",
    "DataSection",
    "DataSource",
    "EvalSection",
    "GenerateSection",
    "LogSection",
    "LossSection",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "Scoring",
    "TrainSection",
    "dump",
    "flatten",
    "is_hub_id",
    "json_schema",
    "load",
    "overridden",
    "resolved",
]

MAX_BYTES = 64 * 1024
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|://[^\s/:@]+:[^\s/@]+@"
)


def load(
    path: str | Path, overrides: Sequence[str] = (), stage: str | None = None, *, find_inputs: bool = True
) -> Recipe:
    """Reads the recipe at `path`, with `section.key=value` overrides on top.

    `stage` is the command that asks; a recipe written for another stage is refused. `key=null` in an override puts a
    key back to its default. The paths in the result are absolute, or Hub ids; with `find_inputs=False` they stay as
    written (a finished run's own recipe may outlive its data). Raises RecipeError.
    """
    file = Path(path).expanduser()
    root = _with_overrides(_read(file), overrides)
    root = _check_shape(root, stage)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        raise first_error(error, root) from None
    recipe = _of_stage(recipe, stage or recipe.stage or "sft", given=stage or recipe.stage)
    check_rules(recipe, root)
    return _find_inputs(recipe, root, file) if find_inputs else recipe


def _of_stage(recipe: Recipe, stage: str, given: str | None) -> Recipe:
    """The recipe with the defaults of its stage."""
    loss = recipe.loss
    if loss.type is None:
        loss = loss.model_copy(update={"type": DEFAULT_LOSSES[stage]})
    return recipe.model_copy(update={"stage": given, "loss": loss})


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back as an equal recipe; keys without value or effect are left out."""
    idle = idle_keys(recipe)
    tree = recipe.model_dump(mode="json", exclude_none=True)
    for section in SECTIONS:
        if section in tree:
            tree[section] = {k: v for k, v in tree[section].items() if f"{section}.{k}" not in idle}
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 2**16
    stream = io.StringIO()
    yaml.dump({key: value for key, value in tree.items() if value != {} or key == "adapter"}, stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "tuner recipe"}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> JSON value, e.g. `train.batch_size` -> 64; `adapter` -> None where there is no such section."""
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        if key in SECTIONS and value is not None:
            flat |= {f"{key}.{name}": leaf for name, leaf in value.items()}
        else:
            flat[key] = value
    return flat


def resolved(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy in which dotted keys (`model.dtype`) have the values that `auto` came to; checked like a recipe."""
    tree = recipe.model_dump()
    for key, value in values.items():
        section, name = key.split(".")
        assert name in SECTIONS[section].model_fields, f"no such key: {key}"
        tree[section][name] = value
    return Recipe.model_validate(tree)


def overridden(given: Scoring, overrides: Sequence[str], reads: Sequence[str]) -> Scoring:
    """`given` with `section.key=value` on top, as in a recipe; `reads` are the keys that may be given.

    Raises:
        RecipeError: an override that is malformed, has no effect, or has a value that its key cannot take.
    """
    root = _with_overrides(Node({}, "the command line", 0), overrides)
    tree = given.model_dump()
    for section, node in root.plain().items():
        for name, value in (node if isinstance(node, dict) else {"": node}).items():
            if f"{section}.{name}" not in reads:
                key = f"{section}.{name}".rstrip(".")
                raise RecipeError(
                    f"override '{key}' has no effect here{did_you_mean(key, reads)}; known: {', '.join(reads)}"
                )
            tree[section][name] = value
    try:
        return Scoring.model_validate(tree)
    except ValidationError as error:
        raise first_error(error, root) from None


def _read(file: Path) -> Node:
    """The file's mapping; every RecipeError names the file."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        known = shipped_recipes()
        if file.stem in known and file.suffix in ("", ".yaml", ".yml"):
            remedy = f"; a recipe of this name ships with tuner: write it here with `tuner recipes copy {file.stem}`"
        else:
            remedy = did_you_mean(file.stem, known) + "; `tuner recipes list` names those that ship"
        raise RecipeError(f"there is no recipe at '{file}'{remedy}") from None
    except IsADirectoryError:
        raise RecipeError(f"'{file}' is a folder; give the recipe file in it") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe '{file}': {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"'{file}' is larger than {MAX_BYTES // 1024} KiB, which no recipe needs; is it data?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text; save the recipe as UTF-8") from None
    for number, line_text in enumerate(text.splitlines(), 1):
        _refuse_secret(line_text, f"{file}:{number}")
    root = yaml12.parse(text, str(file))
    if root is None or root.value is None:
        raise RecipeError(f"'{file}' is empty; start from one that ships: `tuner recipes list`")
    if not isinstance(root.value, dict):
        raise RecipeError(
            f"{root.place}: a recipe is a mapping of sections (model:, data:, train:), not {show(root.plain())}"
        )
    return dataclasses.replace(root, place=str(file))


def _refuse_secret(text: str, place: str) -> None:
    if _SECRET.search(text):
        raise RecipeError(f"{place}: this looks like a credential; remove it, and log in with `hf auth login` instead")


def _with_overrides(root: Node, overrides: Sequence[str]) -> Node:
    seen: set[str] = set()
    for i, text in enumerate(overrides):
        _refuse_secret(text, "override")
        key, equals, value = text.partition("=")
        key = key.strip()
        place = f"override '{show(text)[1:-1]}'"
        if not equals or not key or not all(key.split(".")):
            raise RecipeError(f"{place}: an override has the form section.key=value")
        if key in seen:
            raise RecipeError(f"{place}: {key} is given twice; keep one")
        seen.add(key)
        line = 2**20 + i  # after every line of the file
        node = yaml12.parse(value, place, numbered=False) or Node(None, place, line)
        root = _set(root, key.split("."), dataclasses.replace(node, line=line), place)
    return root


def _set(node: Node, path: Sequence[str], new: Node, place: str, done: str = "") -> Node:
    """A copy of `node` with `new` at `path`; a null takes a known key out, back to its default."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{place}: {done} is {show(node.plain())} in the recipe, not a section; give {done} whole")
    name, rest = path[0], path[1:]
    children = dict(node.value)
    where = f"{done}.{name}" if done else name
    if rest:
        child = children.get(name)
        if child is None or child.value is None:
            child = Node({}, place, new.line)
        children[name] = _set(child, rest, new, place, where)
    elif new.value is None and _is_known(where):
        children.pop(name, None)
    else:
        children[name] = new
    return dataclasses.replace(node, value=children)


def _is_known(key: str) -> bool:
    section, _, name = key.partition(".")
    return name in SECTIONS[section].model_fields if section in SECTIONS and name else key in Recipe.model_fields


def _check_shape(root: Node, stage: str | None) -> Node:
    """Empty sections become sections of defaults, and the stage is compared with the command."""
    assert isinstance(root.value, dict)
    sections = dict(root.value)
    for name, node in root.value.items():
        if name in SECTIONS and node.value is None:
            if name == "adapter":
                raise RecipeError(
                    f"{node.place}: adapter is empty; write 'adapter: {{}}' for LoRA with the defaults, "
                    f"or remove the line to train all weights"
                )
            sections[name] = dataclasses.replace(node, value={})
    given = sections.get("stage")
    if stage is not None and given is not None and given.value not in (None, stage):
        known = did_you_mean(str(given.value), [stage])
        remedy = known or f"; run `tuner {given.value}`, or remove the line"
        raise RecipeError(f"{given.place}: stage is {show(given.value)}, but the command is `tuner {stage}`{remedy}")
    return dataclasses.replace(root, value=sections)


def _find_inputs(recipe: Recipe, root: Node, file: Path) -> Recipe:
    """The recipe with every path that it reads made absolute."""

    def found(key: tuple[str | int, ...], text: str, hub: bool) -> str:
        name = ".".join(str(step) for step in key if not isinstance(step, int))
        return find_input(text, file, f"{find(root, key).place}: {name}", hub=hub)

    def local_only(key: tuple[str | int, ...], path: str, revision: str | None) -> None:
        if revision is not None and not is_hub_id(path):
            place = find(root, (*key, "revision")).place
            name = ".".join(str(step) for step in key if not isinstance(step, int))
            raise RecipeError(f"{place}: {name}.revision has no effect: '{path}' is not a Hub id; remove it")

    def sources(name: str, given: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        paths = [found(("data", name, i, "path"), source.path, True) for i, source in enumerate(given)]
        for i, (source, path) in enumerate(zip(given, paths, strict=True)):
            local_only(("data", name, i), path, source.revision)
        return tuple(s.model_copy(update={"path": path}) for s, path in zip(given, paths, strict=True))

    model = recipe.model.model_copy(
        update={"name_or_path": found(("model", "name_or_path"), recipe.model.name_or_path, True)}
    )
    local_only(("model",), model.name_or_path, model.revision)
    data = recipe.data.model_copy(update={"train": sources("train", recipe.data.train)})
    if isinstance(data.eval, tuple):
        data = data.model_copy(update={"eval": sources("eval", data.eval)})
    update: dict[str, Any] = {"model": model, "data": data}
    if recipe.eval.questions is not None:
        questions = found(("eval", "questions"), recipe.eval.questions, False)
        update["eval"] = recipe.eval.model_copy(update={"questions": questions})
    if recipe.adapter is not None and recipe.adapter.path is not None:
        path = found(("adapter", "path"), recipe.adapter.path, False)
        update["adapter"] = recipe.adapter.model_copy(update={"path": path})
    return recipe.model_copy(update=update)
