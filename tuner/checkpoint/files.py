"""Bytes -> files and directories that are wholly there or not at all: fsync, hash, rename, restore.

A directory appears under its name by one rename, after every byte in it was fsynced; and what it replaces is removed
only after that. So a crash leaves old or new, never half.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tuner.errors import SaveError

MANIFEST = "manifest.json"
OLD = ".tuner-old-"  # what a replacement sets aside between its two renames


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        fsync(path)
    fsync(directory)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
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
    old = target.with_name(OLD + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        temporary.mkdir()
        write(temporary)
        fsync_tree(temporary)
        if replace and target.exists():
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise save_error(target, what, needed_bytes, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_error(target: Path, what: str, needed_bytes: int, error: Exception) -> SaveError:
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
    old = target.with_name(OLD + target.name)
    if old.is_dir() and target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        os.rename(old, target)
