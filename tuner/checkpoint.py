"""Tensors and JSON state -> a run directory that survives crashes, full disks and second processes; and back.

    runs/chat/
      recipe.yaml  manifest.json  metrics.jsonl        what ran, on what, and how it went
      checkpoints/step-000120/{*.safetensors, state.json, manifest.json}
      adapter/ or model/                               the result

Two rules make it safe. A directory appears under its published name only by one rename, after every byte in it has
been fsynced; and what it replaces is removed only after that. So a crash leaves old or new, never half. Every file is
listed with its sha256, and nothing is loaded that does not match. Files are safetensors and JSON, never pickle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tuner
from tuner.errors import Interrupted, NonFiniteError, RunDirError, SaveError
from tuner.registry import did_you_mean

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
OPTIMIZER = "optimizer"  # the one tensor file without which a resume would silently start a fresh optimizer
RUN_FORMAT = 1  # of the run directory and of checkpoints

# What may differ on resume without being asked: it cannot change the trajectory. (`train.max_steps` may also grow.)
FREE_KEYS = frozenset({"train.microbatch_tokens", "train.output_dir", "eval.samples"})
FREE_SECTIONS = ("log.",)

_OLD = ".tuner-old-"  # what a replacement sets aside between its two renames
_STEP = re.compile(r"step-(\d{6,})")
_SECRETS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{8,}")
Log = Callable[[str], None]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- files: fsync, hash, atomic replacement ---------------------------------------------------------------------------


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _fsync(path)
    _fsync(directory)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """`{relative name: {"bytes", "sha256"}}` of every file below `directory`, its own manifest.json left out."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": digest}
    return entries


def human_bytes(count: float) -> str:
    """`1.5 GB` for 1.5e9."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_space(place: Path, needed_bytes: int, what: str) -> None:
    """SaveError when the disk that holds `place` (or its nearest existing parent) has less than `needed_bytes` free."""
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise SaveError(
            f"{place}: {what} needs {human_bytes(needed_bytes)} and {human_bytes(free)} are free; nothing was written; "
            "make room or choose another output directory"
        )


def publish_directory(
    target: Path, write: Callable[[Path], None], *, what: str, needed_bytes: int = 0, replace: bool = False
) -> None:
    """`write` fills a temporary sibling, which is fsynced and then renamed to `target`; all or nothing.

    With `replace`, a `target` that exists is set aside just before the rename and deleted after it (`recover` brings
    it back after a crash in between). Any failure removes the temporary directory and leaves `target` as it was; a
    failure of the disk becomes a SaveError that names the place and the free and needed bytes.
    """
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    old = target.with_name(_OLD + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        temporary.mkdir()
        write(temporary)
        _fsync_tree(temporary)
        if replace and target.exists():
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _save_error(target, what, needed_bytes, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_error(target: Path, what: str, needed_bytes: int, error: Exception) -> SaveError:
    place = target.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    size = f", {human_bytes(needed_bytes)} needed" if needed_bytes else ""
    return SaveError(
        f"{target}: could not write {what}: {reason} ({human_bytes(free)} free{size}); what was there before is intact"
    )


def recover(target: Path) -> None:
    """Undoes or completes a replacement of `target` that a crash interrupted."""
    old = target.with_name(_OLD + target.name)
    if old.is_dir() and target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        os.rename(old, target)


# --- nested state <-> tensors and JSON --------------------------------------------------------------------------------


def flatten_state(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested dicts, lists and tuples of tensors, numbers, strings and None -> ({name: tensor}, JSON value).

    The JSON keeps the types of keys (an optimizer's are ints) and of sequences; anything else is a TypeError, since
    it could only be written by pickle.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(nested, "", tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "_"
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Mapping):
        items = [[_encode(k, "", {}), _encode(v, f"{path}.{k}".lstrip("."), tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{path}.{i}".lstrip("."), tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise TypeError(f"state '{path}' is a {type(value).__name__}, which JSON and safetensors cannot hold")


def unflatten_state(tensors: Mapping[str, Tensor], encoded: Any) -> Any:
    """The inverse of `flatten_state`."""
    if not isinstance(encoded, dict):
        return encoded
    ((kind, value),) = encoded.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {k: unflatten_state(tensors, v) for k, v in value}
    items = [unflatten_state(tensors, v) for v in value]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> tuple[dict[str, Tensor], Any]:
    """The global generators of torch (CPU, and the current CUDA device if in use), numpy and `random`, flattened."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    numpy_state = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]
    return flatten_state(
        {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy_state, "python": random.getstate()}
    )


def set_rng_state(tensors: Mapping[str, Tensor], encoded: Any) -> None:
    """Sets the generators that `rng_state` read."""
    state = unflatten_state(tensors, encoded)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    path: Path
    step: int

    def load(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """`({file stem: {name: tensor on CPU}}, state)`, as they were given to `RunDir.publish`."""
        listed = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["files"]
        tensors = {Path(n).stem: load_file(self.path / n) for n in listed if n.endswith(".safetensors")}
        return tensors, json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def _sealed(step: int, files: Mapping[str, Any]) -> str:
    """The text of a checkpoint's manifest; it carries its own hash, so that a flipped byte in it shows too."""
    body = json.dumps({"format": RUN_FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return body[:-2] + f',\n "seal": "{seal}"\n}}\n'


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint directory, naming the file; None if it is whole. Sizes first, then hashes."""
    manifest = checkpoint / MANIFEST
    try:
        text = manifest.read_bytes().decode()
        listed = json.loads(text)
        files, step = dict(listed["files"]), int(listed["step"])
        whole = text == _sealed(step, files) and checkpoint.name == f"step-{step:06d}"
    except FileNotFoundError:
        return f"{manifest} is missing (the save was cut short)"
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{manifest} is damaged"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file() or path.is_symlink():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    actual = file_entries(checkpoint)
    for name, entry in files.items():
        if actual[name]["sha256"] != entry["sha256"]:
            return f"{checkpoint / name} is corrupted (its sha256 does not match)"
    if f"{OPTIMIZER}.safetensors" not in files:
        return f"{checkpoint / OPTIMIZER}.safetensors was never saved (weights only)"
    return None


def refuse_nonfinite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """NonFiniteError naming the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{what}: tensor '{name}' holds a NaN or an infinity; it was not saved")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory with another (safetensors refuses views of one storage)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


def _write_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    for name, group in tensors.items():
        assert re.fullmatch(r"[a-z0-9_]+", name), name
        save_file(_storable(group), directory / f"{name}.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in directory.iterdir():
        _fsync(path)
    (directory / MANIFEST).write_text(_sealed(step, file_entries(directory)), encoding="utf-8")


# --- the run directory ------------------------------------------------------------------------------------------------


def read_manifest(run: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, or None where there is none of ours."""
    try:
        manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("tuner_run") == RUN_FORMAT else None


def _redacted(value: Any) -> Any:
    """`value` as plain JSON, with access tokens and passwords in URLs blotted out."""
    return json.loads(_SECRETS.sub("***", json.dumps(value, default=str)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tuner": tuner.__version__}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def _lock(directory: Path) -> int:
    """A file descriptor that holds the directory's lock until it is closed; RunDirError if a process has it."""
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise RunDirError(
            f"{directory}: another tuner process is at work there; wait for it, or choose another train.output_dir"
        ) from None
    return fd


def _drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{key: (old, new)}` of what changed and may change the trajectory."""
    absent = "(absent)"
    changed = {
        key: (old.get(key, absent), new.get(key, absent))
        for key in sorted({*old, *new})
        if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS) and old.get(key, absent) != new.get(key, absent)
    }
    if _grown(old, new):
        changed.pop("train.max_steps", None)
    return changed


def _grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    before, after = old.get("train.max_steps"), new.get("train.max_steps")
    return isinstance(before, int) and isinstance(after, int) and after > before


def _asides(path: Path) -> list[Path]:
    """Runs set aside by `--overwrite` of `path`, oldest first."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.previous-(\d+)")
    found = [(int(m.group(1)), p) for p in path.parent.glob(".*") if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


class RunDir:
    """One run's directory, locked for this process. Made by `create`; use it as a context manager, or `close` it."""

    def __init__(self, path: Path, manifest: dict[str, Any], locks: Sequence[int], log: Log) -> None:
        self.path = path
        self.manifest = manifest
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
        if path.is_symlink():
            raise RunDirError(f"{output_dir} is a symbolic link; name the directory itself as train.output_dir")
        if path.exists() and not path.is_dir():
            raise RunDirError(f"{output_dir} is a file; choose another train.output_dir")
        try:
            if not path.exists() and _asides(path):
                os.rename(_asides(path)[-1], path)  # a crash cut an overwrite short before it began
                log(f"{output_dir}: brought back the run that an interrupted --overwrite had set aside")
            occupied = path.is_dir() and any(path.iterdir())
            if occupied and read_manifest(path) is None:
                raise RunDirError(
                    f"{output_dir} holds files but no readable manifest.json of a tuner run, so it is neither resumed "
                    "nor overwritten; choose another train.output_dir"
                )
            if occupied and resume:
                return cls._resume(path, recipe_text, _redacted(dict(identity)), allow_drift, log)
            if occupied and not overwrite:
                raise RunDirError(f"{output_dir} holds a run already; pass --resume to continue it, or --overwrite")
            return cls._start(path, recipe_text, _redacted(dict(identity)), occupied, log)
        except OSError as error:
            raise RunDirError(f"{output_dir}: the run directory cannot be made: {error.strerror or error}") from error

    @classmethod
    def _start(cls, path: Path, recipe_text: str, identity: dict[str, Any], occupied: bool, log: Log) -> RunDir:
        locks = [_lock(path)] if occupied else []
        path.parent.mkdir(parents=True, exist_ok=True)
        old = (read_manifest(path) or {}) if occupied else {}
        number = 1 + max((int(p.name.rpartition("-")[2]) for p in _asides(path)), default=0)
        aside = path.with_name(f".{path.name}.previous-{number}")
        if occupied:
            _refuse_self_overwrite(path, identity)
        manifest = {
            "tuner_run": RUN_FORMAT,
            "status": "running",
            "started_at": _now(),
            "versions": _versions(),
            "device": _device(),
            "identity": identity,
            "replaces": [*old.get("replaces", []), *([aside.name] if occupied else [])],
        }
        staging = path.with_name(f".{path.name}.new-{os.getpid()}")
        staging.mkdir()
        try:
            locks.append(_lock(staging))
            (staging / RECIPE).write_text(_SECRETS.sub("***", recipe_text), encoding="utf-8")
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            (staging / "checkpoints").mkdir()
            _fsync_tree(staging)
            if occupied:
                os.rename(path, aside)
            try:
                os.rename(staging, path)
            except OSError:
                if occupied:
                    os.rename(aside, path)
                raise
            _fsync(path.parent)
        except BaseException:
            _close_all(locks)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if occupied:
            log(f"{path}: the run that was here is kept as {aside.name} until this one has finished")
        return cls(path, manifest, locks, log)

    @classmethod
    def _resume(
        cls, path: Path, recipe_text: str, identity: dict[str, Any], allow_drift: Sequence[str], log: Log
    ) -> RunDir:
        lock = _lock(path)
        manifest = read_manifest(path)
        assert manifest is not None
        run = cls(path, manifest, [lock], log)
        before = manifest["identity"]
        changed = _drift(before, identity)
        for key in allow_drift:
            if key not in before and key not in identity:
                hint = did_you_mean(key, {*before, *identity})
                raise RunDirError(f"--allow-drift {key}: no such key in the run's manifest{hint}")
        refused = {key: values for key, values in changed.items() if key not in allow_drift}
        if refused:
            listed = "; ".join(f"{k} was {o!r} and is now {n!r}" for k, (o, n) in refused.items())
            flags = " ".join(f"--allow-drift {k}" for k in refused)
            raise RunDirError(
                f"{path}: cannot resume, the run differs from the one that was started: {listed}; "
                f"undo the change, or accept it with {flags}"
            )
        for name in ("checkpoints", "adapter", "model"):
            if (path / name).is_symlink():
                raise RunDirError(f"{path / name} is a symbolic link; a run directory holds none")
        if manifest["status"] == "finished" and not _grown(before, identity):
            return run
        for place in (path, path / "checkpoints"):
            for old in place.glob(f"{_OLD}*"):
                recover(place / old.name.removeprefix(_OLD))
            for leftover in place.glob(".tmp-*"):  # of a save that a crash cut short
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        drift = [{"key": k, "old": o, "new": n, "at": _now()} for k, (o, n) in changed.items()]
        _write_atomically(path / RECIPE, _SECRETS.sub("***", recipe_text))
        run.record(
            status="running",
            identity=identity,
            drift=[*manifest.get("drift", []), *drift],
            resumed_at=[*manifest.get("resumed_at", []), _now()],
            versions=_versions(),
            device=_device(),
        )
        return run

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None and not self.finished:
                self.record(status="interrupted" if isinstance(error, Interrupted) else "failed")
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
        self.manifest.update(_redacted(fields))
        with self._saving(self.path / MANIFEST, "the manifest"):
            _write_atomically(self.path / MANIFEST, json.dumps(self.manifest, indent=1))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. `row` has a `step`; a number that is not finite is written as null."""
        assert "step" in row
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._saving(self.path / METRICS, "metrics"), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Cuts metrics.jsonl back to `step` (of the checkpoint resumed from; 0: none), a torn last line included."""
        path = self.path / METRICS
        if not path.exists():
            return
        with self._saving(path, "metrics"):
            *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _step_of(line) <= step]
            _write_atomically(path, "".join(f"{line}\n" for line in kept))

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
                    _fsync(self.path / METRICS)
            publish_directory(
                target,
                lambda directory: _write_checkpoint(directory, step, tensors, state),
                what=what,
                needed_bytes=needed,
                replace=True,
            )
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
        self.record(results={**self.manifest.get("results", {}), kind: entries})
        return target

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the run finished, then deletes the run that `--overwrite` had set aside."""
        replaced = self._replaced()
        self.record(status="finished", finished_at=_now(), summary=dict(summary))
        for aside in replaced:
            shutil.rmtree(aside, ignore_errors=True)
        self.record(replaces=[])

    @contextmanager
    def _saving(self, target: Path, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _save_error(target, what, 0, error) from error


def check_result(directory: Path, what: str) -> None:
    """Every tensor of every safetensors file below is finite, and there is no pickle."""
    for path in directory.rglob("*"):
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl"), f"{path} is a pickle"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    refuse_nonfinite(f"{what}, {path.name}", {name: file.get_tensor(name)})


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # unreadable: cut away


def _refuse_self_overwrite(path: Path, identity: Mapping[str, Any]) -> None:
    """RunDirError when the recipe reads from the very directory that `--overwrite` is about to set aside."""
    for key, value in identity.items():
        if key == "train.output_dir" or not isinstance(value, str):
            continue
        if Path(os.path.abspath(value)).is_relative_to(path):
            raise RunDirError(f"{key}: {value} lies in {path}, which --overwrite replaces; name another output_dir")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
