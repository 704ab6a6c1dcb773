"""What a run says about itself: its identity (for resume), versions and device, without secrets."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tuner import __version__
from tuner.checkpoint.files import MANIFEST

RUN_FORMAT = 1

# What may differ on resume without being asked: it cannot change the trajectory. (`train.max_steps` may also grow.)
FREE_KEYS = frozenset({"train.microbatch_tokens", "train.output_dir", "eval.samples", "data.cache"})
FREE_SECTIONS = ("log.",)
_SECRETS = re.compile(r"""(?<=://)[^/\s:@"']+:[^/\s@"']+(?=@)|\bhf_[A-Za-z0-9]{8,}""")


def read_manifest(run: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, or None where there is none of ours."""
    try:
        manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("tuner_run") != RUN_FORMAT:
        return None
    whole = isinstance(manifest.get("identity"), dict) and isinstance(manifest.get("status"), str)
    return manifest if whole else None


def redact(text: str) -> str:
    """`text` with access tokens and passwords in URLs blotted out."""
    return _SECRETS.sub("***", text)


def redacted(value: Any) -> Any:
    """`value` as plain JSON, `redact`ed."""
    return json.loads(redact(json.dumps(value, default=str)))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {"python": platform.python_version(), "tuner": __version__}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device() -> str:
    """What the run computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{key: (old, new)}` of what changed and may change the trajectory."""
    absent = "(absent)"
    changed = {
        key: (old.get(key, absent), new.get(key, absent))
        for key in sorted({*old, *new})
        if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS) and old.get(key, absent) != new.get(key, absent)
    }
    if grown(old, new):
        changed.pop("train.max_steps", None)
    return changed


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`drift`, and more steps too: with those a run can go on, but it is not the run that they would have made."""
    more = {"train.max_steps": (old.get("train.max_steps"), new.get("train.max_steps"))} if grown(old, new) else {}
    return drift(old, new) | more


def grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the new identity asks for more steps."""
    before, after = old.get("train.max_steps"), new.get("train.max_steps")
    return isinstance(before, int) and isinstance(after, int) and after > before
