"""A pipeline file and its overrides -> its stages in order, each with its own checked recipe. Imports no torch.

    version: 1
    output_dir: runs/align               # a stage writes to <output_dir>/<its name>
    stages:
      - run: sft                         # its name too, where no name: is given
        recipe: recipes/chat.yaml        # what it starts from; sections beside it go over it
      - run: dpo
        recipe: recipes/pref.yaml
        adapter: {path: $sft}            # the result of an earlier stage
      - run: merge
        adapter: $dpo

`$NAME` stands for what the stage of that name will have written. It is read as `adapter.path`, `model.name_or_path` and
`reference.model` of a recipe, and as the `adapter` of a merge; whether it is the right kind of thing is known, and
refused, before anything runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from tuner.errors import RecipeError
from tuner.recipe import build, shipped
from tuner.recipe.paths import find_input
from tuner.recipe.read import put, read, with_overrides
from tuner.recipe.rules import first_error, show
from tuner.recipe.schema import SECTIONS, ModelSection, Recipe, Section, Stage, Text
from tuner.recipe.yaml12 import Node
from tuner.registry import did_you_mean

REFERS = "$"  # before the name of an earlier stage


class StageEntry(Section):
    """What every stage says, besides the sections of its recipe or the keys of its merge."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = Field(
        None, description="Letters, digits, - and _; default: what it runs."
    )
    run: Literal["sft", "reward", "dpo", "merge"] = Field(description="The command.")
    recipe: Text | None = Field(None, description="A recipe file to start from.")


class MergeSection(Section):
    """The keys of a merge: an adapter and its base -> one plain Hugging Face directory."""

    adapter: Text = Field(description="`$NAME` of a stage, a run or an adapter directory.")
    output: Text | None = Field(None, description="Where to; default: the stage's folder in output_dir.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="Default: that of the base.")


class PipelineFile(Section):
    """The keys of a pipeline file; its stages are checked one by one."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    output_dir: Text = Field(description="The folder that holds the stages, relative to the current directory.")


@dataclass(frozen=True)
class TrainStage:
    """A stage that trains by a recipe. `feeds` says which of its inputs are results of which earlier stages."""

    name: str
    run: Stage
    source: str | None  # the recipe file it starts from, as written
    recipe: Recipe
    feeds: Mapping[str, str] = field(default_factory=dict)  # key -> name of a stage

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.train.output_dir)

    @property
    def result(self) -> Path:
        """Where its weights will lie."""
        return self.output_dir / ("model" if self.recipe.adapter is None else "adapter")


@dataclass(frozen=True)
class MergeStage:
    """A stage that merges an adapter into its base."""

    name: str
    adapter: Path
    output_dir: Path
    dtype: str | None
    feeds: Mapping[str, str] = field(default_factory=dict)
    run: Literal["merge"] = "merge"

    @property
    def result(self) -> Path:
        return self.output_dir


@dataclass(frozen=True)
class Pipeline:
    """Stages in order; each reads only what earlier ones, or files that are there, provide."""

    file: Path
    output_dir: Path
    stages: tuple[TrainStage | MergeStage, ...]


def is_pipeline(file: Path) -> bool:
    """Whether a file is a pipeline, and not the recipe of one stage."""
    root = read(file)
    return isinstance(root.value, dict) and "stages" in root.value


def load(path: str | Path, overrides: Sequence[str] = (), *, find_inputs: bool = True) -> Pipeline:
    """Reads the pipeline at `path`, with `stage.section.key=value` (and `output_dir=value`) on top.

    With `find_inputs=False` the paths stay as written, and `$NAME` too.

    Raises:
        RecipeError: a key or a value is wrong, in any of the stages; or a `$NAME` is not what its reader needs.
    """
    file = Path(path).expanduser()
    root = read(file)
    assert isinstance(root.value, dict)
    if "stages" not in root.value and {"model", "data", "train"} & root.value.keys():
        raise RecipeError(
            f"{file}: this is the recipe of one stage, not a pipeline; run it with `tuner sft` or its like"
        )
    stages = root.value.get("stages")
    if stages is None or not isinstance(stages.value, list) or not stages.value:
        place = stages.place if stages else str(file)
        raise RecipeError(f"{place}: stages is missing or empty; list what runs, as in `tuner recipes show align`")
    entries = [_entry(node, i) for i, node in enumerate(stages.value)]
    names = [entry.name or entry.run for entry in entries]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RecipeError(f"{stages.value[i].place}: two stages are called '{name}'; give one another name:")
    own, of_stage = _sort(overrides, names)
    top = _top(root, own)
    reader = _Reader(file, Path(top.output_dir), find_inputs)
    for name, entry, node in zip(names, entries, stages.value, strict=True):
        reader.add(name, entry, node, of_stage.get(name, ()))
    return Pipeline(file, Path(top.output_dir), tuple(reader.stages.values()))


def inputs(pipeline: Pipeline) -> list[str]:
    """Every path or Hub id that a pipeline reads, as it is written there: recipes, models, data; no `$NAME`."""
    reads: list[str] = []
    for stage in pipeline.stages:
        if isinstance(stage, MergeStage):
            reads.append(str(stage.adapter))
        else:
            reads += [stage.source] if stage.source else []
            reads += shipped.inputs(stage.recipe)
    return [text for text in dict.fromkeys(reads) if not text.startswith(REFERS)]


def _top(root: Node, overrides: Sequence[str]) -> PipelineFile:
    root = with_overrides(root, overrides)
    assert isinstance(root.value, dict)
    _known_keys(root, (*PipelineFile.model_fields, "stages"), "")
    plain = dataclasses.replace(root, value={key: node for key, node in root.value.items() if key != "stages"})
    try:
        return PipelineFile.model_validate(plain.plain())
    except ValidationError as error:
        raise first_error(error, plain) from None


def _sort(overrides: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of the pipeline itself, and those of each stage without its name."""
    own, of_stage = list[str](), dict[str, list[str]]()
    for text in overrides:
        head, dot, rest = text.partition(".")
        key = text.partition("=")[0].strip()
        if key == "output_dir":
            own.append(text)
        elif dot and head in names:
            of_stage.setdefault(head, []).append(rest)
        else:
            name = key.partition(".")[0]
            hint = did_you_mean(name, [*names, "output_dir"]) or f"; its stages: {', '.join(names)}"
            raise RecipeError(
                f"override '{show(text)[1:-1]}': an override has the form stage.section.key=value or output_dir=value, "
                f"and '{name}' is no stage of this pipeline{hint}"
            )
    return own, of_stage


def _entry(node: Node, index: int) -> StageEntry:
    """The keys that every stage may have, checked; unknown ones are refused by what it runs."""
    where = f"stages[{index}]"
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.place}: {where}: expected a mapping (run: sft, ...), got {show(node.plain())}")
    run = node.value.get("run")
    merges = run is not None and run.value == "merge"
    own = ("name", "run") if merges else tuple(StageEntry.model_fields)
    _known_keys(node, (*own, *(MergeSection.model_fields if merges else SECTIONS)), where)
    given = {key: child for key, child in node.value.items() if key in own}
    try:
        return StageEntry.model_validate({key: child.plain() for key, child in given.items()})
    except ValidationError as error:
        raise _in_stage(first_error(error, dataclasses.replace(node, value=given)), where) from None


def _in_stage(error: RecipeError, where: str) -> RecipeError:
    """The same, with the stage before the key: `a.yaml:3: stages[1].run: expected ...`."""
    place, _, rest = str(error).partition(": ")
    return RecipeError(f"{place}: {where}.{rest}")


def _known_keys(node: Node, known: Sequence[str], where: str) -> None:
    assert isinstance(node.value, dict)
    for key, child in node.value.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"; known here: {', '.join(known)}"
            raise RecipeError(f"{child.place}: unknown key '{where}{'.' if where else ''}{key}'{hint}")


class _Reader:
    """Stages as they are read, one after the other: what a later one may refer to."""

    def __init__(self, file: Path, output_dir: Path, find_inputs: bool) -> None:
        self.file, self.output_dir, self.find_inputs = file, output_dir, find_inputs
        self.stages: dict[str, TrainStage | MergeStage] = {}

    def add(self, name: str, entry: StageEntry, node: Node, overrides: Sequence[str]) -> None:
        """Reads a stage and files it under its name; its directory must be no other's."""
        stage = (
            self._merge(name, node, overrides)
            if entry.run == "merge"
            else self._train(name, entry, entry.run, node, overrides)
        )
        mine = Path(os.path.abspath(stage.output_dir))
        if Path(os.path.abspath(self.output_dir)).is_relative_to(mine):
            raise RecipeError(
                f"{node.place}: stage '{name}' would write to {stage.output_dir}, where the pipeline's own output_dir "
                f"{self.output_dir} lies; give it a directory of its own"
            )
        for other in self.stages.values():
            theirs = Path(os.path.abspath(other.output_dir))
            if mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
                raise RecipeError(
                    f"{node.place}: stage '{name}' would write to {stage.output_dir}, and stage '{other.name}' to "
                    f"{other.output_dir}; give each a directory of its own"
                )
        self.stages[name] = stage

    def _train(self, name: str, entry: StageEntry, run: Stage, node: Node, overrides: Sequence[str]) -> TrainStage:
        assert isinstance(node.value, dict)
        base, recipe_file = Node({}, node.place, node.line), self.file
        if entry.recipe is not None:
            place = f"{node.value['recipe'].place}: recipe"
            recipe_file = Path(find_input(entry.recipe, self.file, place, hub=False))
            base = _start(read(recipe_file), run, place, entry.recipe)
        sections = {key: child for key, child in node.value.items() if key in SECTIONS}
        root = with_overrides(_over(base, sections), overrides, prefix=f"{name}.")
        root = _with_output(root, str(self.output_dir / name), node)
        feeds: dict[str, str] = {}

        def find(text: str, at: Node, key: str, hub: bool) -> str:
            if text.startswith(REFERS):
                feeds[key] = text.removeprefix(REFERS)
                return self._resolve(key, feeds[key], f"{at.place}: {key}")
            of_recipe = at.place.startswith(f"{recipe_file}:")
            return find_input(text, recipe_file if of_recipe else self.file, f"{at.place}: {key}", hub=hub)

        try:
            recipe = build(root, run, find if self.find_inputs else None)
        except RecipeError as error:
            raise RecipeError(f"stage '{name}': {error}") from None
        stage = TrainStage(name, run, entry.recipe, recipe, feeds)
        self._check_base(stage, node)
        return stage

    def _merge(self, name: str, node: Node, overrides: Sequence[str]) -> MergeStage:
        assert isinstance(node.value, dict)
        own = {key: child for key, child in node.value.items() if key in MergeSection.model_fields}
        root = with_overrides(dataclasses.replace(node, value=own), overrides, prefix=f"{name}.")
        _known_keys(root, tuple(MergeSection.model_fields), name)
        try:
            section = MergeSection.model_validate(root.plain())
        except ValidationError as error:
            raise RecipeError(f"stage '{name}': {first_error(error, root)}") from None
        assert isinstance(root.value, dict)
        place, feeds, adapter = f"{root.value['adapter'].place}: adapter", dict[str, str](), section.adapter
        if adapter.startswith(REFERS):
            feeds["adapter"] = adapter.removeprefix(REFERS)
        if self.find_inputs:
            adapter = (
                self._resolve("adapter", feeds["adapter"], f"stage '{name}': {place}")
                if feeds
                else find_input(adapter, self.file, place, hub=False)
            )
        return MergeStage(name, Path(adapter), Path(section.output or self.output_dir / name), section.dtype, feeds)

    def _resolve(self, key: str, name: str, place: str) -> str:
        """The path that `$name` stands for, if an earlier stage of this name gives what `key` reads."""
        stage = self.stages.get(name)
        if stage is None:
            known = ", ".join(f"{REFERS}{other}" for other in self.stages) or "none"
            hint = did_you_mean(name, self.stages)
            raise RecipeError(f"{place}: '{REFERS}{name}' names no earlier stage{hint}; earlier ones: {known}")
        if key not in _READS:
            raise RecipeError(
                f"{place}: '{REFERS}{name}' is the result of a stage, which is read as {', '.join(_READS)} and nowhere "
                "else; write ./ before a path that begins with $"
            )
        wanted, found = _READS[key], _gives(stage)
        if found != wanted:
            raise RecipeError(
                f"{place}: '{REFERS}{name}' gives {found}, and {wanted} is needed{_remedy(found, wanted)}"
            )
        return os.path.abspath(stage.output_dir if wanted == _ADAPTER else stage.result)

    def _check_base(self, stage: TrainStage, node: Node) -> None:
        """An adapter goes on training on the base it was trained on, quantised alike."""
        earlier = self.stages.get(stage.feeds.get("adapter.path", ""))
        if not isinstance(earlier, TrainStage):
            return
        for key, value in _base(stage.recipe.model).items():
            before = _base(earlier.recipe.model).get(key)
            if value != before:
                raise RecipeError(
                    f"{node.place}: stage '{stage.name}' goes on with the adapter of '{earlier.name}', whose {key} is "
                    f"{show(before)} and not {show(value)}; give both the same"
                )


_ADAPTER, _MODEL, _REWARD = "an adapter", "full weights", "a reward model"
_READS = {
    "adapter.path": _ADAPTER,
    "model.name_or_path": _MODEL,
    "reference.model": _MODEL,
    "adapter": _ADAPTER,
}


def _gives(stage: TrainStage | MergeStage) -> str:
    """What lies in the directory of a stage once it has finished."""
    if isinstance(stage, MergeStage):
        return _MODEL
    if stage.run == "reward":
        return _REWARD
    return _MODEL if stage.recipe.adapter is None else _ADAPTER


def _remedy(found: str, wanted: str) -> str:
    if (found, wanted) == (_ADAPTER, _MODEL):
        return "; merge it in a stage between the two"
    if (found, wanted) == (_MODEL, _ADAPTER):
        return "; there is nothing to merge or to go on with, its weights are ready to use (model.name_or_path)"
    return ""


def _base(model: ModelSection) -> dict[str, object]:
    """What must be the same where an adapter goes on."""
    keys = ["name_or_path", "revision", "load_in_4bit"]
    keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dtype"] if model.load_in_4bit else []
    return {f"model.{key}": getattr(model, key) for key in keys}


def _start(root: Node, run: str, place: str, written: str) -> Node:
    """The recipe that a stage starts from, without its output_dir: where a stage writes is the pipeline's to say."""
    assert isinstance(root.value, dict)
    given = root.value.get("stage")
    if given is not None and given.value not in (None, run):
        raise RecipeError(f"{place}: {written} is a recipe for `tuner {given.value}`, and this stage runs {run}")
    children = dict(root.value)
    train = children.get("train")
    if train is not None and isinstance(train.value, dict):
        kept = {key: child for key, child in train.value.items() if key != "output_dir"}
        children["train"] = dataclasses.replace(train, value=kept)
    return dataclasses.replace(root, value=children)


def _over(base: Node, sections: Mapping[str, Node]) -> Node:
    """`base` with the keys of `sections` on top; a null puts a key back to its default."""
    for name, section in sections.items():
        if not isinstance(section.value, dict):
            base = dataclasses.replace(base, value={**_children(base), name: section})
            continue
        if name == "adapter" and "path" in section.value:  # it brings all else itself
            base = dataclasses.replace(base, value={k: v for k, v in _children(base).items() if k != name})
        for key, child in section.value.items():
            base = put(base, (name, key), child, child.place)
        if not section.value and name not in _children(base):
            base = dataclasses.replace(base, value={**_children(base), name: section})
    return base


def _with_output(root: Node, output_dir: str, node: Node) -> Node:
    train = _children(root).get("train")
    if train is not None and (not isinstance(train.value, dict) or "output_dir" in train.value):
        return root
    return put(root, ("train", "output_dir"), Node(output_dir, node.place, node.line), node.place)


def _children(node: Node) -> Mapping[str, Node]:
    assert isinstance(node.value, dict)
    return node.value
