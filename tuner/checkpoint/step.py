"""One step's tensors and state -> a checkpoint directory with a sealed list of hashes, and back once they match."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.checkpoint.files import MANIFEST, file_entries, fsync
from tuner.errors import NonFiniteError

OPTIMIZER = "optimizer"  # the one file stem without which a resume would silently start a fresh optimizer
FORMAT = 1


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
    body = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return body[:-2] + f',\n "seal": "{seal}"\n}}\n'


def damage(checkpoint: Path, *, resumable: bool = True) -> str | None:
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
    if resumable and f"{OPTIMIZER}.safetensors" not in files:
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


def write_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    for name, group in tensors.items():
        assert re.fullmatch(r"[a-z0-9_]+", name), name
        save_file(_storable(group), directory / f"{name}.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in directory.iterdir():
        fsync(path)
    (directory / MANIFEST).write_text(_sealed(step, file_entries(directory)), encoding="utf-8")


def check_result(directory: Path, what: str) -> None:
    """Every tensor of every safetensors file below is finite, and there is no pickle."""
    for path in directory.rglob("*"):
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl"), f"{path} is a pickle"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    refuse_nonfinite(f"{what}, {path.name}", {name: file.get_tensor(name)})
