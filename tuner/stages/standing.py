"""A recipe and its output directory -> whether the run in it is the run of that recipe, and how far it has come."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tuner.checkpoint import check_output, differences, file_entries, read_manifest, redacted
from tuner.checkpoint.step import OPTIMIZER
from tuner.model.load import base_fingerprint
from tuner.recipe import Recipe
from tuner.stages import prepare
from tuner.stages.machine import find_machine
from tuner.stages.rows import accepted

_HASH = re.compile(r"(sha256 )?[0-9a-f]{64}")


@dataclass(frozen=True)
class Standing:
    """How a run stands; `changes` are clauses on why it must be done anew, if it must."""

    begun: bool
    finished: bool
    changes: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """There is nothing to do."""
        return self.finished and not self.changes

    @property
    def resumes(self) -> bool:
        """It may go on from where it is, or start where nothing is saved yet."""
        return self.begun and not self.changes


def standing(recipe: Recipe) -> Standing:
    """Compares what the run was made of with what it would be made of now; trains and writes nothing.

    Raises:
        RunDirError: train.output_dir holds something that is no run of ours.
        UserError: an input cannot be used.
    """
    directory = Path(recipe.train.output_dir)
    check_output(directory, resume=True, overwrite=False, reads={})
    manifest = read_manifest(directory)
    if manifest is None:
        return Standing(begun=False, finished=False)
    machine = find_machine(recipe, resume=True)
    accepts, fit = accepted(machine.recipe)
    data = prepare.data(machine.recipe, machine.devices, Console(quiet=True), accepts, fit)
    base_sha256 = base_fingerprint(machine.recipe.model.name_or_path, machine.recipe.model.revision)
    identity = redacted(prepare.identity_of(machine.recipe, data, base_sha256))
    changes = [_clause(key, *values) for key, values in differences(manifest["identity"], identity).items()]
    finished = manifest["status"] == "finished"
    more = _damaged(directory, manifest.get("results", {})) if finished else _unresumable(directory)
    return Standing(True, finished, (*changes, *more))


def _clause(key: str, old: Any, new: Any) -> str:
    """`train.max_steps was 4 and is now 6`; where hashes differ, what they are of."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        files = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return f"{key} has changed: {', '.join(files)}"
    if any(isinstance(value, str) and _HASH.fullmatch(value) for value in (old, new)):
        return f"{key} has changed"
    return f"{key} was {_show(old)} and is now {_show(new)}"


def _show(value: Any) -> str:
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _damaged(directory: Path, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Files of the result that are not what the run wrote."""
    for kind, entries in results.items():
        actual = file_entries(directory / kind)
        for name, entry in entries.items():
            if actual.get(name) != entry:
                yield f"{directory / kind / name} is {'not what the run wrote' if name in actual else 'gone'}"


def _unresumable(directory: Path) -> Iterator[str]:
    """That nothing of what an unfinished run has saved holds the state of its optimizer."""
    saved = list((directory / "checkpoints").glob("step-*"))
    if saved and not any((place / f"{OPTIMIZER}.safetensors").exists() for place in saved):
        yield f"what {directory} has saved are weights only (log.save_weights_only), from which no run can go on"
