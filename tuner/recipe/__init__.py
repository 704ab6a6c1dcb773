"""A recipe file and its overrides -> one frozen, checked `Recipe`. Imports no torch.

`load` refuses what is wrong in one sentence with the place, the key, the value and the remedy, and resolves the paths
that a recipe names. `schema.py` holds the sections, `yaml12.py` and `read.py` read the text, `rules.py` words what is
wrong, `paths.py` finds files, `shipped.py` copies the recipes that ship, `pipeline.py` puts several recipes in order.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from tuner.errors import RecipeError
from tuner.recipe.paths import find_input, is_hub_id
from tuner.recipe.read import read, with_overrides
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
    ReferenceSection,
    Scoring,
    TrainSection,
)
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
    "ReferenceSection",
    "Scoring",
    "TrainSection",
    "build",
    "dump",
    "flatten",
    "is_hub_id",
    "json_schema",
    "load",
    "overridden",
    "resolved",
]

# (text of a path, the value it stands in, its key, whether it may be a Hub id) -> the path made absolute
FindInput = Callable[[str, Node, str, bool], str]


def load(
    path: str | Path, overrides: Sequence[str] = (), stage: str | None = None, *, find_inputs: bool = True
) -> Recipe:
    """Reads the recipe at `path`, with `section.key=value` overrides on top.

    `stage` is the command that asks; a recipe written for another stage is refused. `key=null` in an override puts a
    key back to its default. The paths in the result are absolute, or Hub ids; with `find_inputs=False` they stay as
    written (a finished run's own recipe may outlive its data). Raises RecipeError.
    """
    file = Path(path).expanduser()

    def find_beside(text: str, node: Node, name: str, hub: bool) -> str:
        return find_input(text, file, f"{node.place}: {name}", hub=hub)

    return build(with_overrides(read(file), overrides), stage, find_beside if find_inputs else None)


def build(root: Node, stage: str | None, find_input: FindInput | None) -> Recipe:
    """The recipe that a tree of sections holds, checked; `find_input` makes its paths absolute (None: as written)."""
    root = _check_shape(root, stage)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        raise first_error(error, root) from None
    recipe = _of_stage(recipe, stage or recipe.stage or "sft", given=stage or recipe.stage)
    check_rules(recipe, root)
    return recipe if find_input is None else _find_inputs(recipe, root, find_input)


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
    root = with_overrides(Node({}, "the command line", 0), overrides)
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
    if "stages" in sections:
        raise RecipeError(f"{sections['stages'].place}: this is a pipeline, of several stages; run it with `tuner run`")
    given = sections.get("stage")
    if stage is not None and given is not None and given.value not in (None, stage):
        known = did_you_mean(str(given.value), [stage])
        remedy = known or f"; run `tuner {given.value}`, or remove the line"
        raise RecipeError(f"{given.place}: stage is {show(given.value)}, but the command is `tuner {stage}`{remedy}")
    return dataclasses.replace(root, value=sections)


def _find_inputs(recipe: Recipe, root: Node, find_input: FindInput) -> Recipe:
    """The recipe with every path that it reads made absolute."""

    def found(key: tuple[str | int, ...], text: str, hub: bool) -> str:
        name = ".".join(str(step) for step in key if not isinstance(step, int))
        return find_input(text, find(root, key), name, hub)

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
    if recipe.reference.model != "auto":
        path = found(("reference", "model"), recipe.reference.model, True)
        update["reference"] = recipe.reference.model_copy(update={"model": path})
    return recipe.model_copy(update=update)
