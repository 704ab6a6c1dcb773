"""This machine -> the facts that decide what a run does here: versions, devices, instruction set, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from tuner import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
    "trl",
)


def describe() -> dict[str, Any]:
    """Facts by name, JSON-ready; an absent package is None. No host name, user or path is among them."""
    devices = [_device(i) for i in range(torch.cuda.device_count())]
    return {
        "tuner": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "device": "cuda" if devices else "cpu",
        "gpus": devices,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": _native_bfloat16(bool(devices)),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """One `name  value` line a fact."""
    width = max(map(len, facts)) + 2
    return [f"{name:{width}}{_shown(value)}" for name, value in facts.items()]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name} (sm{properties.major}{properties.minor}, {memory:.0f} GiB)"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _native_bfloat16(cuda: bool) -> bool:
    if cuda:
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
