"""A checked pipeline -> its stages run in order, each fed by those before it; what is done and unchanged is skipped.

    tuner run recipes/align.yaml

Each stage is the same function as its command, in this process. A stage that was interrupted goes on; one that has
finished is skipped while all that it was made of is the same (keys of its recipe, hashes of its data, base, adapter),
and done anew otherwise, with the old result kept aside until the new one has succeeded. So starting again after a kill
ends with the bytes of an undisturbed run, and a changed key reruns its stage and those that read its result.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from tuner.checkpoint import lock, read_manifest
from tuner.errors import Interrupted, RunDirError, TunerError
from tuner.export import merge
from tuner.recipe import AdapterSection, Recipe
from tuner.recipe.pipeline import MergeStage, Pipeline, TrainStage
from tuner.stages.standing import Standing, standing
from tuner.train.setup import Devices, find_devices, resolve_threads

T = TypeVar("T")
Stage = TrainStage | MergeStage


@dataclass(frozen=True)
class Done:
    """What became of a stage: where its result lies, and how long it took (None: it was done already)."""

    stage: Stage
    seconds: float | None


def run(pipeline: Pipeline, *, dry_run: bool = False) -> list[Done]:
    """Runs what is not done yet, and says what became of each stage.

    Raises:
        UserError, RunError, Interrupted: of the stage that its note names; what the stages before it wrote is there.
    """
    devices = find_devices()
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not devices.is_main)
    with nullcontext() if dry_run or not devices.is_main else _locked(pipeline.output_dir):
        runner = _Runner(pipeline, devices, console)
        first = runner.survey(say=dry_run)
        if dry_run:
            return []
        done = [runner.pursue(i, known=i <= first) for i in range(len(pipeline.stages))]
    _summarise(done, console)
    return done


class _Runner:
    """The stages of a pipeline on the devices of this process."""

    def __init__(self, pipeline: Pipeline, devices: Devices, console: Console) -> None:
        self.pipeline, self.devices, self.console = pipeline, devices, console
        self._standings: list[Standing] = []

    def survey(self, *, say: bool) -> int:
        """How many stages are done, from the first on. Those after them are checked as far as they can be: a mistake in
        the last one must not show after hours. With `say` all of it is printed, as the plan."""
        stages, ahead = self.pipeline.stages, False
        for i, stage in enumerate(stages):
            if say:
                self._headline(i)
            with self._in_stage(i):
                if not ahead:
                    self._standings.append(_on_main(self.devices, lambda stage=stage: _standing(stage)))  # type: ignore[misc]
                    ahead = not self._standings[-1].done
                    if say:
                        self._say_standing(stage, self._standings[-1])
                if ahead:
                    with nullcontext() if say else redirect_stdout(io.StringIO()):
                        self._check(stage)
        return len(self._standings) - ahead

    def pursue(self, index: int, *, known: bool) -> Done:
        """Skips, continues or runs a stage. `known`: nothing has changed since the survey looked at it."""
        stage, started = self.pipeline.stages[index], time.monotonic()
        self._headline(index)
        with self._in_stage(index):
            found = self._standings[index] if known else _on_main(self.devices, lambda: _standing(stage))
            self._say_standing(stage, found)
            if found.done:
                return Done(stage, None)
            if isinstance(stage, MergeStage):
                _on_main(self.devices, lambda: self._merge(stage))
            else:
                _command(stage)(stage.recipe, resume=found.resumes, overwrite=not found.resumes)
        gc.collect()  # the modules of a model know each other: without this they would lie beside the next stage's
        torch.cuda.empty_cache()
        return Done(stage, time.monotonic() - started)

    def _merge(self, stage: MergeStage) -> None:
        torch.set_num_threads(resolve_threads("auto", self.devices.world_size))  # not those of the stage before
        if stage.output_dir.parent == self.pipeline.output_dir:  # which is locked, so nobody is writing them
            for leftover in stage.output_dir.parent.glob(
                f".tmp-{stage.output_dir.name}-*"
            ):  # of a merge that was killed
                shutil.rmtree(leftover)
        report = merge.merge(stage.adapter, stage.output_dir, dtype=stage.dtype, overwrite=True)
        for line in report.lines():
            self.console.print(line)

    def _check(self, stage: Stage) -> None:
        """What can be known of a stage before those that feed it have run."""
        if isinstance(stage, MergeStage):
            _on_main(self.devices, lambda: merge.check_target(stage.output_dir, overwrite=True))
            return
        recipe = _with_stand_ins(stage, self.pipeline)
        if recipe is None:
            self.console.print(f"later    checked once {stage.recipe.model.name_or_path} is there")
            return
        _command(stage)(recipe, dry_run=True)

    def _headline(self, index: int) -> None:
        stage = self.pipeline.stages[index]
        source = stage.source if isinstance(stage, TrainStage) else None
        what = " ".join(part for part in (stage.run if stage.run != stage.name else "", source) if part)
        self.console.print(
            f"{chr(10) if index else ''}stage    {index + 1} of {len(self.pipeline.stages)}: {stage.name}"
            f"{f' ({what})' if what else ''}"
        )

    def _say_standing(self, stage: Stage, found: Standing) -> None:
        if found.done:
            self.console.print(f"skipped  {stage.output_dir} has finished, and nothing that it was made of has changed")
        elif found.changes:
            self.console.print(f"anew     {'; '.join(found.changes)}")
        elif found.begun:
            self.console.print(f"goes on  {stage.output_dir} has not finished")

    @contextmanager
    def _in_stage(self, index: int) -> Iterator[None]:
        """Notes the stage at whatever ends the pipeline in it, and how to go on."""
        stages = self.pipeline.stages
        again = f"`tuner run {self.pipeline.file}` again continues"
        try:
            yield
        except BaseException as error:
            error.add_note(f"stage {index + 1} of {len(stages)} ({stages[index].name})")
            if isinstance(error, Interrupted):
                error.remedy = again
            elif not isinstance(error, Exception):  # a signal while nothing trained
                self.console.print(f"stopped  {again}")
            raise


def _command(stage: TrainStage) -> Callable[..., dict[str, Any]]:
    """The function of `tuner sft` and its like."""
    command: Callable[..., dict[str, Any]] = importlib.import_module(f"tuner.stages.{stage.run}").run
    return command


def _standing(stage: Stage) -> Standing:
    if isinstance(stage, TrainStage):
        return standing(stage.recipe)
    merge.check_target(stage.output_dir, overwrite=True)
    if not stage.output_dir.exists():
        return Standing(begun=False, finished=False)
    changes = merge.changes(stage.adapter, stage.output_dir, dtype=stage.dtype)
    if changes is None:  # an empty folder
        return Standing(begun=False, finished=False)
    return Standing(begun=True, finished=True, changes=tuple(changes))


def _with_stand_ins(stage: TrainStage, pipeline: Pipeline) -> Recipe | None:
    """A recipe whose rows are read and tokenised as the stage's will be, without results that are not there yet.

    A fresh adapter stands in for one that an earlier stage will train, and the base that an earlier stage starts from
    for its full weights, with the template that will be saved with them. None: nothing can stand in.
    """
    recipe, stages = stage.recipe, {other.name: other for other in pipeline.stages}
    if "adapter.path" in stage.feeds and not (stages[stage.feeds["adapter.path"]].result).is_dir():
        recipe = recipe.model_copy(update={"adapter": AdapterSection()})
    if "reference.model" in stage.feeds and not Path(recipe.reference.model).is_dir():
        recipe = recipe.model_copy(update={"reference": recipe.reference.model_copy(update={"model": "auto"})})
    source: Stage = stage
    while not Path(recipe.model.name_or_path).is_dir():
        key = "adapter" if isinstance(source, MergeStage) else "model.name_or_path"
        if key not in source.feeds:  # a Hub id, or the merge of an adapter of elsewhere
            return None if isinstance(source, MergeStage) else recipe
        source = stages[source.feeds[key]]
        if isinstance(source, TrainStage):
            recipe = _on_the_base_of(source.recipe, recipe)
    return recipe


def _on_the_base_of(earlier: Recipe, recipe: Recipe) -> Recipe:
    """`recipe` on the base of an earlier stage, with the template that this stage saves."""
    data = recipe.data
    if data.chat_template == "auto":
        keys = ("chat_template", "date_string", "template_options", "control_tokens")
        data = data.model_copy(update={key: getattr(earlier.data, key) for key in keys})
    model = {"name_or_path": earlier.model.name_or_path, "revision": earlier.model.revision}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model), "data": data})


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Keeps a second `tuner run` out of the folder of the stages."""
    if read_manifest(output_dir) is not None:
        raise RunDirError(f"output_dir: {output_dir} is the run of one stage; choose another folder for the pipeline")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held = lock(output_dir)
    except OSError as error:
        raise RunDirError(f"output_dir: {output_dir} cannot be used: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(held)


def _on_main(devices: Devices, work: Callable[[], T]) -> T:
    """What `work` gives on the main rank, told to all; its error ends them all for the same reason."""
    told: list[Any] = [None, None]
    if devices.is_main:
        try:
            told[0] = work()
        except TunerError as error:
            told[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def _summarise(done: list[Done], console: Console) -> None:
    """One line a stage: where its result lies, and how long it took."""
    names, results = max(len(d.stage.name) for d in done), max(len(str(d.stage.result)) for d in done)
    console.print()
    for i, d in enumerate(done):
        took = "unchanged" if d.seconds is None else f"{d.seconds:,.0f} s"
        console.print(f"{'' if i else 'done':<9}{d.stage.name:<{names}}  {d.stage.result!s:<{results}}  {took}")
