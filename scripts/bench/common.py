"""What every benchmark shares: the facts of machine and versions, processes that take turns, one schema of results.

A result is one JSON file, `results/NAME.json`:

    schema, name, command, date, commit, dirty, machine, versions
    cases: a list of
        name, settings          what is measured, and what all sides have in common
        headline, better        the number of a run that counts, and whether `higher` or `lower` is better
        sides: {side: {settings, environment, runs, parity_losses}}
                                a run is what one process measured; parity_losses are those of the first steps on one
                                fixed batch, the same one for all sides
        against                 the side that others are compared with, or null
        ratios: {side: {median, low, high, turns}}      how many times better than `against`, turn by turn
        loss_differences: {side: [...]}                 parity_losses minus those of `against`
        floor                   what the work cannot do without (floor.py), or null
        notes                   what a reader must know, e.g. what did not run and why

What was not recorded is null; nothing is estimated. Names end in their unit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"
SCHEMA = 1
FIELDS = {"schema", "name", "command", "date", "commit", "dirty", "machine", "versions", "cases"}
PLAIN = dict(os.environ)  # before anything of ours has touched it
THREADING = (
    "OMP_",
    "MKL_",
    "GOMP_",
    "KMP_",
    "ONEDNN_",
    "DNNL_",
    "MALLOC_",
    "GLIBC_",
    "LD_PRELOAD",
    "TORCH_",
    "PYTORCH_",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from tuner.errors import TunerError, UserError, first_line  # noqa: E402

# --- what a user can get wrong ---


def run(main: Callable[[], None]) -> None:
    """A script: what a user gets wrong is one sentence and exit code 2, as of the command line; Ctrl-C is 130."""
    try:
        main()
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: stopped by SIGINT; a result that was not yet written is lost", file=sys.stderr)
        sys.exit(130)


def count(text: str) -> int:
    """An argument that counts something: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{text}'")
    return int(text)


def output(text: str) -> Path:
    """An argument that says where a result goes; a place that cannot be written is refused before the measuring."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write '{text}': {error.strerror}") from None
    if not was_there:
        path.unlink()
    return path


# --- the machine ---


def facts() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a result."""
    from tuner import environment

    described = environment.describe()
    machine = (
        "platform",
        "cpu",
        "instruction_set",
        "native_bfloat16",
        "cores",
        "usable_cores",
        "threads",
        "gpus",
        "cuda",
    )
    packages = ("tuner", "python", *environment.PACKAGES)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_commit(),
        "machine": {
            **{name: described[name] for name in machine},
            "instructions": _instructions(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu_state": _gpu_state(),
            "load_average": round(os.getloadavg()[0], 2),  # of the last minute: what else ran
        },
        "versions": {name: described[name] for name in packages},
    }


def _commit() -> dict[str, Any]:
    """The commit, and whether what was measured differs from it; BENCH_COMMIT says it where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", ".", ":!scripts/bench/results", ":!README.md"]
        dirty = bool(subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("BENCH_COMMIT"), "dirty": None}
    return {"commit": commit, "dirty": dirty}


def _instructions() -> list[str]:
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [name for name in INSTRUCTIONS if name in words]


def _gpu_state() -> str | None:
    """Name, driver, clocks and power limit, as `nvidia-smi` tells them; nothing is set."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


# --- one side, in a process of its own ---


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Args:
        settings: what distinguishes it, for the record.
        environment: `tuner`, the variables that our command line sets; or `default`, those of the caller.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "tuner"


def variables(environment: str) -> dict[str, str]:
    """The variables of a process: on both sides offline, quiet, and with this repository on the path."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("BENCH_PATH")]))  # of unpacked wheels, see gpu.py
    quiet |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": path}
    quiet |= {"BENCH_PATH": os.environ["BENCH_PATH"]} if "BENCH_PATH" in os.environ else {}
    if environment == "default":
        return PLAIN | {"TOKENIZERS_PARALLELISM": "true"} | quiet
    try:
        from tuner import cli
    except ModuleNotFoundError:  # a GPU machine may lack what the command line needs
        return variables("default")
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(PLAIN)
        cli.set_environment()
        return dict(os.environ) | quiet
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(result: Mapping[str, Any]) -> None:
    """What a child says, in its last line: what it measured, and how it was set up."""
    import torch

    setup = {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREADING)}
    setup["threads"] = str(torch.get_num_threads())
    print("\n" + json.dumps({"peak_memory_bytes": peak_memory_bytes(), **result, "environment": setup}), flush=True)


class ChildFailed(Exception):
    """A side that ended without an answer; the message has the last line that it wrote."""


def child(script: str, side: str, *arguments: str, environment: str = "tuner", **changes: str) -> dict[str, Any]:
    """Runs one side of a script in a fresh process, `changes` in its variables, and reads its answer."""
    command = [sys.executable, script, "--side", side, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables(environment) | changes, check=False, cwd=ROOT
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["nothing was said"]
        raise ChildFailed(f"{side} did not run (exit {done.returncode}): {said[0][:300]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@dataclass
class Turns:
    """What the sides measured, and what a reader must know of how."""

    runs: dict[str, list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)


def take_turns(
    script: str,
    sides: Mapping[str, Side],
    arguments: Sequence[str],
    repeats: int,
    headline: str,
    deadline: float = math.inf,
) -> Turns:
    """`repeats` runs of every side, in turns: A B A B. A side that fails is left out, with what it said; after
    `deadline` (of `time.monotonic`) no turn begins."""
    turns, failed = Turns({name: [] for name in sides}), set[str]()
    for repeat in range(repeats):
        if time.monotonic() > deadline:
            turns.notes.append(f"{repeat} of {repeats} turns: the time was up")
            break
        for name, side in sides.items():
            if name in failed:
                continue
            try:
                run = child(script, name, *arguments, environment=side.environment)
            except ChildFailed as error:
                failed.add(name)
                turns.notes.append(str(error))
                print(f"{repeat + 1}/{repeats} {name:<22}failed: {error}", flush=True)
                continue
            turns.runs[name].append(run)
            print(f"{repeat + 1}/{repeats} {name:<22}{_number(run[headline]):>12} {headline}", flush=True)
    return turns


# --- results ---


def middle(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    found = list(values)
    return statistics.median(found), min(found), max(found)


def case(
    name: str,
    headline: str,
    sides: Mapping[str, Side],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    settings: Mapping[str, Any],
    better: str = "higher",
    against: str | None = None,
    parity: Mapping[str, Sequence[float]] | None = None,
    floor: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One case of a result, with the ratios and differences worked out."""
    parity = parity or {}
    told = {}
    for side, measured in runs.items():
        environment = dict(measured[0].get("environment", {})) if measured else {}
        told[side] = {
            "settings": dict(sides[side].settings),
            "environment": {"variables_of": sides[side].environment, **environment},
            "runs": [{key: value for key, value in run.items() if key != "environment"} for run in measured],
            "parity_losses": list(parity[side]) if side in parity else None,
        }
    return {
        "name": name,
        "settings": dict(settings),
        "headline": headline,
        "better": better,
        "sides": told,
        "against": against,
        "ratios": ratios(runs, headline, better, against) if against else {},
        "loss_differences": differences(parity, against) if against else {},
        "floor": dict(floor) if floor else None,
        "notes": list(notes),
    }


def ratios(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], headline: str, better: str, against: str
) -> dict[str, dict[str, Any]]:
    """How many times better each side is than `against`, turn by turn."""
    found = {}
    for side, measured in runs.items():
        if side == against or not measured or not runs.get(against):
            continue
        pairs = list(zip(measured, runs[against], strict=False))
        turns = [a[headline] / b[headline] if better == "higher" else b[headline] / a[headline] for a, b in pairs]
        median, low, high = middle(turns)
        found[side] = {"median": median, "low": low, "high": high, "turns": turns}
    return found


def differences(parity: Mapping[str, Sequence[float]], against: str) -> dict[str, list[float]]:
    """The losses of each side minus those of `against`, step by step on the same batch."""
    if against not in parity:
        return {}
    return {
        side: [a - b for a, b in zip(losses, parity[against], strict=False)]
        for side, losses in parity.items()
        if side != against
    }


def show(one: Mapping[str, Any], memory: str = "peak_memory_bytes") -> None:
    """A case as a table for people."""
    print(f"\n{one['name']}")
    print(f"{'':<24}{one['headline']:>22}  {'(min - max)':<24}{'peak memory':>12}  losses on one batch")
    for side, told in one["sides"].items():
        if not told["runs"]:
            continue
        median, low, high = middle(run[one["headline"]] for run in told["runs"])
        peak = [run[memory] for run in told["runs"] if run.get(memory) is not None]
        held = f"{statistics.median(peak) / 1e9:.2f} GB" if peak else ""
        losses = ", ".join(f"{loss:.5f}" for loss in told["parity_losses"] or ())
        print(f"{side:<24}{_number(median):>22}  {f'({_number(low)} - {_number(high)})':<24}{held:>12}  {losses}")
    for side, ratio in one["ratios"].items():
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
        print(f"{side} over {one['against']}, turn by turn: {spread}")
    least = one["floor"]
    if least and least.get("share") is not None:
        print(f"floor: {least['seconds']:.4f} s that cannot be spared, {least['share']:.0%} of our step")
    for note in one["notes"]:
        print(f"note: {note}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def write(name: str, cases: Sequence[Mapping[str, Any]], output: Path | None) -> Path:
    """Writes a result, under `results/NAME.json` if not told otherwise."""
    path = output or RESULTS / f"{name}.json"
    command = shlex.join(Path(word).name if word.startswith("/") else word for word in sys.argv)
    result = {"schema": SCHEMA, "name": name, "command": command, **facts(), "cases": list(cases)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """A result of this schema.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); run the benchmark again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{path} is no result of schema {SCHEMA}; run the benchmark again, or move the file away")
    if lacking := sorted(FIELDS - found.keys()):
        raise UserError(f"{path} has no {', '.join(lacking)}; run the benchmark again")
    return found


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` gives, and None; or None and one line that says why it gave nothing."""
    try:
        return work(), None
    except Exception as error:  # whatever a library raises where it does not run
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {(lines[0] if lines else '')[:200]}"
