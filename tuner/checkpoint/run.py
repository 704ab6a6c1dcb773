"""A run -> its directory: locked, resumed or replaced, checkpoints rotated, metrics, result, manifest."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from tuner.checkpoint.files import (
    MANIFEST,
    OLD,
    check_space,
    file_entries,
    fsync,
    fsync_tree,
    publish_directory,
    recover,
    save_error,
    write_atomically,
)
from tuner.checkpoint.manifest import (
    RUN_FORMAT,
    device,
    drift,
    grown,
    now,
    read_manifest,
    redact,
    redacted,
    versions,
)
from tuner.checkpoint.step import Checkpoint, check_result, damage, refuse_nonfinite, write_checkpoint
from tuner.errors import Interrupted, RunDirError, SaveError, UserError, first_line
from tuner.registry import did_you_mean

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
_STEP = re.compile(r"step-(\d{6,})")
Log = Callable[[str], None]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lock(directory: Path) -> int:
    """A file descriptor that holds the directory's lock until it is closed; RunDirError if a process has it."""
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        raise RunDirError(
            f"{directory}: another tuner process is at work there; wait for it, or choose another output_dir"
        ) from None
    return fd


def _asides(path: Path) -> list[Path]:
    """Runs set aside by `--overwrite` of `path`, oldest first."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.previous-(\d+)")
    found = [(int(m.group(1)), p) for p in path.parent.glob(".*") if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def check_output(output_dir: Path, *, resume: bool, overwrite: bool, reads: Mapping[str, Any]) -> bool:
    """Whether a run lies in `output_dir`; changes nothing, and takes no time, so that it can come before everything.

    `reads` is what the run will read, by recipe key. RunDirError: a run may not start, resume or be replaced there.
    """
    path = Path(os.path.abspath(output_dir))
    try:
        if path.is_symlink():
            raise RunDirError(f"{output_dir} is a symbolic link; name the directory itself as train.output_dir")
        if path.exists() and not path.is_dir():
            raise RunDirError(f"{output_dir} is a file; choose another train.output_dir")
        occupied = path.is_dir() and any(path.iterdir())
    except (OSError, ValueError) as error:
        raise RunDirError(f"train.output_dir: {str(output_dir)!r} cannot be used: {first_line(error)}") from None
    if occupied and read_manifest(path) is None:
        raise RunDirError(
            f"{output_dir} holds files but no readable manifest.json of a tuner run, so it is neither resumed nor "
            "overwritten; choose another train.output_dir"
        )
    if occupied and not (resume or overwrite):
        raise RunDirError(f"{output_dir} holds a run already; pass --resume to continue it, or --overwrite")
    for key, value in reads.items() if occupied and overwrite else ():
        if key == "train.output_dir" or not isinstance(value, str):
            continue
        place = Path(os.path.abspath(value))
        if place.exists() and place.is_relative_to(path):
            raise RunDirError(f"{key}: {value} lies in {path}, which --overwrite replaces; name another output_dir")
    return occupied


class RunDir:
    """One run's directory, locked for this process. Made by `create`; use it as a context manager, or `close` it."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        locks: Sequence[int],
        log: Log,
        *,
        undo: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._undo = undo  # takes a start back; None once there is something to keep
        self._log = log
        self._release = weakref.finalize(self, _close_all, list(locks))

    # --- opening ---

    @classmethod
    def create(
        cls,
        output_dir: Path,
        recipe_text: str,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        allow_drift: Sequence[str] = (),
        log: Log = _stderr,
    ) -> RunDir:
        """Starts a run in a new directory, or continues (`resume`) or replaces (`overwrite`) the one that is there.

        `identity` is flat: dotted recipe keys, and hashes of data, template and base. On resume a difference outside
        the free keys and `allow_drift` is refused by name. RunDirError: the directory holds something, is a symlink,
        is in use, or the run in it differs.
        """
        path = Path(os.path.abspath(output_dir))
        if resume and overwrite:
            raise RunDirError("--resume and --overwrite contradict each other: continue the run, or replace it")
        if allow_drift and not resume:
            raise RunDirError("--allow-drift only has a meaning together with --resume")
        try:
            if not os.path.lexists(path) and _asides(path):
                os.rename(_asides(path)[-1], path)  # a crash cut an overwrite short before it began
                log(f"{output_dir}: brought back the run that an interrupted --overwrite had set aside")
            occupied = check_output(output_dir, resume=resume, overwrite=overwrite, reads=identity)
            if occupied and resume:
                return cls._resume(path, recipe_text, redacted(dict(identity)), allow_drift, log)
            return cls._start(path, recipe_text, redacted(dict(identity)), occupied, log)
        except OSError as error:
            raise RunDirError(f"{output_dir}: the run directory cannot be made: {error.strerror or error}") from error

    @classmethod
    def _start(cls, path: Path, recipe_text: str, identity: dict[str, Any], occupied: bool, log: Log) -> RunDir:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = (read_manifest(path) or {}) if occupied else {}
        number = 1 + max((int(p.name.rpartition("-")[2]) for p in _asides(path)), default=0)
        aside = path.with_name(f".{path.name}.previous-{number}")
        locks: list[int] = []
        manifest = {
            "tuner_run": RUN_FORMAT,
            "status": "running",
            "started_at": now(),
            "versions": versions(),
            "device": device(),
            "identity": identity,
            "replaces": [*old.get("replaces", []), *([aside.name] if occupied else [])],
        }
        staging = path.with_name(f".{path.name}.new-{os.getpid()}")
        try:
            if occupied:
                locks.append(lock(path))
            staging.mkdir()
            locks.append(lock(staging))
            (staging / RECIPE).write_text(redact(recipe_text), encoding="utf-8")
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            (staging / "checkpoints").mkdir()
            fsync_tree(staging)
            if occupied:
                os.rename(path, aside)
            try:
                os.rename(staging, path)
            except OSError:
                if occupied:
                    os.rename(aside, path)
                raise
            fsync(path.parent)
        except BaseException:
            _close_all(locks)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if occupied:
            log(f"{path}: the run that was here is kept as {aside.name} until this one has finished")
        return cls(path, manifest, locks, log, undo=lambda: _take_back(path, aside if occupied else None))

    @classmethod
    def _resume(
        cls, path: Path, recipe_text: str, identity: dict[str, Any], allow_drift: Sequence[str], log: Log
    ) -> RunDir:
        held = lock(path)
        manifest = read_manifest(path)
        assert manifest is not None
        run = cls(path, manifest, [held], log)
        try:
            _refuse_drift(path, manifest["identity"], identity, allow_drift)
            if manifest["status"] != "finished" or grown(manifest["identity"], identity):
                run._continue(recipe_text, identity)
        except BaseException:
            run.close()
            raise
        return run

    def _continue(self, recipe_text: str, identity: dict[str, Any]) -> None:
        for name in ("checkpoints", "adapter", "model"):
            if (self.path / name).is_symlink():
                raise RunDirError(f"{self.path / name} is a symbolic link; a run directory holds none")
        for place in (self.path, self.path / "checkpoints"):
            for old in place.glob(f"{OLD}*"):
                recover(place / old.name.removeprefix(OLD))
            for leftover in place.glob(".tmp-*"):  # of a save that a crash cut short
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        changed = drift(self.manifest["identity"], identity)
        write_atomically(self.path / RECIPE, redact(recipe_text))
        self.record(
            status="running",
            identity=identity,
            drift=[
                *self.manifest.get("drift", []),
                *({"key": k, "old": o, "new": n, "at": now()} for k, (o, n) in changed.items()),
            ],
            resumed_at=[*self.manifest.get("resumed_at", []), now()],
            versions=versions(),
            device=device(),
        )
        if not self._published():
            self.rewind(-1)  # nothing to continue from: the metrics begin anew

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            stopped = error is not None and not isinstance(error, Exception)  # by a signal, before training began
            full = isinstance(error, SaveError) and not (self.path / METRICS).exists()  # before the first step
            if self._undo is not None and (stopped or full or isinstance(error, UserError)):
                self._undo()  # exit 2 means that nothing has been changed
            elif error is not None and not self.finished:
                self.record(status="interrupted" if stopped or isinstance(error, Interrupted) else "failed")
                for aside in self._replaced():
                    self._log(f"the run that --overwrite set aside is kept in {aside}")
        except SaveError as second:  # the disk is full: the first error is what to tell
            self._log(str(second))
        finally:
            self.close()

    def close(self) -> None:
        """Gives up the lock."""
        self._release()

    @property
    def finished(self) -> bool:
        """The run has reached its end; there is nothing to resume."""
        return bool(self.manifest["status"] == "finished")

    def _replaced(self) -> list[Path]:
        """The runs set aside by the overwrites that led to this run (only names that `--overwrite` itself gives)."""
        return [p for p in _asides(self.path) if p.name in self.manifest["replaces"]]

    # --- while it runs ---

    def record(self, **fields: Any) -> None:
        """Adds or replaces top-level entries of manifest.json (counts, chosen backends, ...), atomically."""
        self.manifest.update(redacted(fields))
        with self._saving(self.path / MANIFEST, "the manifest"):
            write_atomically(self.path / MANIFEST, json.dumps(self.manifest, indent=1))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. `row` has a `step`; a number that is not finite is written as null."""
        assert "step" in row
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._saving(self.path / METRICS, "metrics"), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Cuts metrics.jsonl back to `step` (of the checkpoint resumed from), a torn last line included."""
        path = self.path / METRICS
        if not path.exists():
            return
        with self._saving(path, "metrics"):
            *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def check_space(self, needed_bytes: int) -> None:
        """SaveError when a checkpoint of `needed_bytes` would not fit beside what is there. Call it before training."""
        check_space(self.path, needed_bytes, "a checkpoint")

    def publish(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        save_total_limit: int | None = None,
        keep: Collection[int] = (),
    ) -> Checkpoint:
        """Writes `checkpoints/step-<step>` durably, then removes all but the newest `save_total_limit` and `keep`.

        `tensors` is `{file stem: {name: tensor}}`; without the stem `optimizer` it can be loaded but not resumed.
        Metrics of this step must have been appended before. NonFiniteError: a tensor is not finite. SaveError: the
        disk refused; what was published before is intact.
        """
        assert save_total_limit is None or save_total_limit >= 1
        for name, group in tensors.items():
            refuse_nonfinite(f"checkpoint of step {step}, {name}", group)
        target = self.path / "checkpoints" / f"step-{step:06d}"
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        if not target.is_dir() or damage(target) is not None:  # a whole one of this step is the one we resumed from
            what = f"the checkpoint of step {step}"
            check_space(target.parent, needed, what)
            with self._saving(target, what):
                if (self.path / METRICS).exists():
                    fsync(self.path / METRICS)
            publish_directory(
                target,
                lambda directory: write_checkpoint(directory, step, tensors, state),
                what=what,
                needed_bytes=needed,
                replace=True,
            )
        self._undo = None
        self._rotate(step, save_total_limit, keep)
        return Checkpoint(target, step)

    def _published(self) -> list[tuple[int, Path]]:
        """By step, not by time: copying or touching a directory changes its time."""
        places = (self.path / "checkpoints").glob("step-*")
        return sorted((int(m.group(1)), p) for p in places if (m := _STEP.fullmatch(p.name)) and not p.is_symlink())

    def _rotate(self, step: int, limit: int | None, keep: Collection[int]) -> None:
        """Runs only after `step` is durable, which is never removed itself."""
        older = [(s, p) for s, p in self._published() if s < step]
        surplus = [] if limit is None else older[: max(0, len(older) - (limit - 1))]
        # Those of later steps are what `latest` skipped as damaged: they must not count as the newest.
        doomed = [p for s, p in surplus if s not in keep] + [p for s, p in self._published() if s > step]
        for path in doomed:
            try:
                dying = path.with_name(f".tmp-{path.name}-{os.getpid()}")  # so that no half is left under the name
                os.rename(path, dying)
                shutil.rmtree(dying)
            except OSError as error:
                self._log(f"{path}: could not remove the old checkpoint: {error.strerror}")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; each damaged one above it is logged. None: nothing saved yet.

        RunDirError when there are checkpoints and none of them can be resumed.
        """
        problems: list[str] = []
        for step, path in reversed(self._published()):
            problem = damage(path)
            if problem is None:
                for line in problems:
                    self._log(f"skipped a checkpoint: {line}; resuming from step {step} instead")
                return Checkpoint(path, step)
            problems.append(problem)
        if problems:
            raise RunDirError(
                f"{self.path}: no checkpoint can be resumed: {'; '.join(problems)}; restore the file, or pass "
                "--overwrite to start anew"
            )
        return None

    # --- the end ---

    def write_result(self, kind: str, save: Callable[[Path], None], *, needed_bytes: int = 0) -> Path:
        """`adapter/` or `model/`, filled by `save(directory)`, checked to be finite, hashed into the manifest."""
        assert kind in ("adapter", "model"), kind
        target = self.path / kind
        entries: dict[str, Any] = {}

        def write(directory: Path) -> None:
            save(directory)
            check_result(directory, f"the result ({kind})")
            entries.update(file_entries(directory))

        publish_directory(target, write, what=f"the result ({kind})", needed_bytes=needed_bytes, replace=True)
        self._undo = None
        self.record(results={**self.manifest.get("results", {}), kind: entries})
        return target

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the run finished, then deletes the run that `--overwrite` had set aside."""
        self._undo, replaced = None, self._replaced()
        self.record(status="finished", finished_at=now(), summary=dict(summary))
        for aside in replaced:
            shutil.rmtree(aside, ignore_errors=True)
        self.record(replaces=[])

    @contextmanager
    def _saving(self, target: Path, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise save_error(target, what, 0, error) from error


def _refuse_drift(
    path: Path, before: Mapping[str, Any], identity: Mapping[str, Any], allow_drift: Sequence[str]
) -> None:
    """RunDirError that names each difference that was not allowed, with both values."""
    for key in allow_drift:
        if key not in before and key not in identity:
            hint = did_you_mean(key, {*before, *identity})
            raise RunDirError(f"--allow-drift {key}: no such key in the run's manifest{hint}")
    refused = {key: values for key, values in drift(before, identity).items() if key not in allow_drift}
    if refused:
        listed = "; ".join(f"{k} was {o!r} and is now {n!r}" for k, (o, n) in refused.items())
        flags = " ".join(f"--allow-drift '{k}'" if " " in k else f"--allow-drift {k}" for k in refused)
        raise RunDirError(
            f"{path}: cannot resume, the run differs from the one that was started: {listed}; undo the change, or "
            f"accept it with {flags}"
        )


def _take_back(path: Path, aside: Path | None) -> None:
    """Undoes the start of a run that has saved nothing yet."""
    shutil.rmtree(path, ignore_errors=True)
    if aside is not None and not path.exists():
        os.rename(aside, path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # unreadable: cut away


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
