"""How long one waits: `tuner --help`, imports, the preparation of data, the first step, and the quickstart by phase.

    python scripts/bench/startup.py                      # each command in a fresh process, in turns
    python scripts/bench/startup.py --quickstart         # also recipes/chat.yaml to its end, by the phases it records

The phases of a run are those of its manifest: they add up to the life of the process until the result was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import Side

ONE_STEP = ["train.max_steps=1", "eval.questions=null", "data.eval=null"]
COMMANDS: dict[str, list[str]] = {
    "tuner --help": ["-m", "tuner", "--help"],
    "import tuner.cli": ["-c", "import tuner.cli"],
    "import torch": ["-c", "import torch"],
    "import of a stage": ["-c", "import tuner.stages.sft"],
    "import trl": ["-c", "from trl import SFTTrainer"],
    "plan, without a token cache": ["-m", "tuner", "sft", "recipes/chat.yaml", "--dry-run", "data.cache=false"],
    "plan, tokens cached": ["-m", "tuner", "sft", "recipes/chat.yaml", "--dry-run"],
}


def timed(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Wall and CPU seconds of one command from its start to its end."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=common.ROOT, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu}


def a_run(overrides: list[str], work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """A training of recipes/chat.yaml, and the phases that its manifest records."""
    output = work / "run"
    command = ["-m", "tuner", "sft", "recipes/chat.yaml", "--overwrite", f"train.output_dir={output}", *overrides]
    found = timed(command, environment)
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    phases = manifest["seconds"]
    return found | {"phases_seconds": phases, "other_seconds": found["seconds"] - sum(phases.values())}


def waits(repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """The case of everything that is waited for before a step."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in COMMANDS}
    timed(COMMANDS["plan, tokens cached"], environment)  # not counted: it fills the cache
    for repeat in range(repeats):
        for name, command in COMMANDS.items():
            runs[name].append(timed(command, environment))
            print(f"{repeat + 1}/{repeats} {name:<30}{runs[name][-1]['seconds']:>8.2f} s", flush=True)
    sides = {name: Side({"command": " ".join(command)}) for name, command in COMMANDS.items()}
    return common.case("waiting", "seconds", sides, runs, settings={"repeats": repeats}, better="lower")


def phases(name: str, overrides: list[str], repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """The case of a training by its phases."""
    runs = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as temporary:
            runs.append(a_run(overrides, Path(temporary), environment))
        print(f"{repeat + 1}/{repeats} {name:<30}{runs[-1]['seconds']:>8.2f} s", flush=True)
    settings = {"recipe": "recipes/chat.yaml", "overrides": overrides, "repeats": repeats}
    return common.case(
        name, "seconds", {"tuner": Side()}, {"tuner": runs}, settings=settings, better="lower",
        notes=["without the installation; its packages are those of scripts/setup"],
    )  # fmt: skip


def show_phases(one: dict[str, Any]) -> None:
    """The phases as a table, each with its median and range."""
    runs = one["sides"]["tuner"]["runs"]
    print(f"\n{one['name']}: {common.middle(run['seconds'] for run in runs)[0]:.1f} s")
    for phase in runs[0]["phases_seconds"]:
        median, low, high = common.middle(run["phases_seconds"].get(phase, 0.0) for run in runs)
        print(f"  {phase:<20}{median:>8.2f} s  ({low:.2f} - {high:.2f})")
    print(f"  {'the rest':<20}{common.middle(run['other_seconds'] for run in runs)[0]:>8.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=common.count, default=3, help="processes of each command")
    parser.add_argument("--quickstart", action="store_true", help="also the whole of recipes/chat.yaml, by phase")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/startup.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        environment = common.variables("tuner") | {"TUNER_CACHE": cache}
        cases = [
            waits(args.repeats, environment),
            phases("one step", ONE_STEP, args.repeats, environment),
        ]
        if args.quickstart:
            cases.append(phases("quickstart", [], args.repeats, environment))
    common.show(cases[0])
    for one in cases[1:]:
        show_phases(one)
    common.write("startup", cases, args.output)


if __name__ == "__main__":
    common.run(main)
