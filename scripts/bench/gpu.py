"""The parts of `scripts/bench/h200`: kernel tests, kernels, SFT, DPO and memory of an 8B Llama with random weights.

Each part is a process with a time limit. Inside of it sides take turns, each in a process of its own (gpu_sides.py),
and the result is written after every case, so that what was measured stands even where the time runs out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from common import Side, Turns

LIMIT_S = 530  # of a part: under 9 minutes
OPTIONAL = ("triton", "bitsandbytes", "pydantic", "ruamel", "datasets", "trl", "flash_attn", "liger_kernel")
ROW = 4096  # tokens of a packed row
SIDES = str(Path(__file__).with_name("gpu_sides.py"))

SFT: dict[str, dict[str, Any]] = {
    "triton": {"backend": "triton", "trains": "lora", "microbatch_tokens": 8192},
    "triton-16k": {"backend": "triton", "trains": "lora", "microbatch_tokens": 16_384},
    "reference": {"backend": "reference", "trains": "lora", "microbatch_tokens": 8192},
    "qlora": {"backend": "triton", "trains": "qlora", "microbatch_tokens": 8192},
}
DPO: dict[str, dict[str, Any]] = {
    "tuner": {"backend": "auto", "trains": "lora", "shared": True},
    "tuner-unshared": {"backend": "auto", "trains": "lora", "shared": False},
    **{f"plain-{n}": {"by": "transformers and peft: padded, no prompt shared", "together": n} for n in (4, 8, 16)},
}
MEMORY: dict[str, dict[str, Any]] = {
    "triton": {"backend": "triton", "trains": "lora", "checkpointing": False},
    "triton-selective": {"backend": "triton", "trains": "lora", "checkpointing": "selective"},
    "triton-checkpointing": {"backend": "triton", "trains": "lora", "checkpointing": True},
    "reference": {"backend": "reference", "trains": "lora", "checkpointing": False},
    "qlora-checkpointing": {"backend": "triton", "trains": "qlora", "checkpointing": True},
}
TRAJECTORY: dict[str, dict[str, Any]] = {"triton": {"backend": "triton"}, "reference": {"backend": "reference"}}


def absent() -> list[str]:
    """Optional packages that are not here."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def left_out() -> list[str]:
    """A note on what could not be measured for want of a package."""
    return [f"what needs {', '.join(absent())} is left out: not installed here"] if absent() else []


def available(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Side]:
    """The sides that can run here: without bitsandbytes none in 4 bits."""
    lacks = "bitsandbytes" in absent()
    return {name: Side(how) for name, how in settings.items() if not (lacks and how.get("trains") == "qlora")}


# --- parts ---


def tests(args: argparse.Namespace) -> None:
    """The kernel tests, compiled where there is a GPU."""
    where = "tests/kernels/test_dispatch.py" if args.tiny else "tests/kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", where]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    run = {"seconds": time.perf_counter() - started, "exit_code": done.returncode, "passed": 0, **counts}
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:40]
    finish(args, "tests", "kernel tests", "passed", {"tests": Side()}, Turns({"tests": [run]}, failures))


def kernels(args: argparse.Namespace) -> None:
    """`ops.py` at the shapes of an 8B."""
    command = [sys.executable, "scripts/bench/ops.py", "--output", str(args.output)]
    command += (
        ["--shape", "tiny", "--repeats", "1", "--without", "compile"]
        if args.tiny
        else ["--shape", "8b", "--limit-s", str(LIMIT_S - 30)]
    )
    subprocess.run(command, cwd=common.ROOT, check=True)


def sft(args: argparse.Namespace) -> None:
    """Tokens a second, MFU, share of the floor, activation bytes: fused kernels, plain ones, 4 bits."""
    sides, cases = available(SFT), list[dict[str, Any]]()
    for case, name, share in (("whole", "documents of 4,096 tokens", 0.55), ("short", "short documents, packed", 0.9)):
        more = ["--part", "sft", "--case", case, *toy(args)]
        turns = common.take_turns(
            SIDES, sides, more, args.repeats, "tokens_per_second", args.started + share * LIMIT_S
        )  # fmt: skip
        least = sft_floor(args, turns) if case == "whole" else None
        turns.notes.append("the first losses are of the same batches on all sides")
        finish(
            args, "sft", f"SFT, LoRA, {name}", "tokens_per_second", sides, turns, against="reference", before=cases,
            parity=first_losses(turns), floor=least,
        )  # fmt: skip


def sft_floor(args: argparse.Namespace, turns: Turns) -> dict[str, Any] | None:
    """The floor of one microbatch, and the share of it that the quickest of our sides reaches."""
    rates = {side: [run["tokens_per_second"] for run in runs] for side, runs in turns.runs.items() if runs}
    if not rates:
        return None
    best = max(rates, key=lambda side: statistics.median(rates[side]))
    tokens = turns.runs[best][0]["microbatch_tokens"]
    try:
        least = common.child(SIDES, "floor", "--part", "floor", "--tokens", str(tokens), *toy(args))
    except common.ChildFailed as error:
        turns.notes.append(str(error))
        return None
    seconds = tokens / statistics.median(rates[best])
    return {**least, "side": best, "step_seconds": seconds, "share": least["seconds"] / seconds}


def dpo(args: argparse.Namespace) -> None:
    """Pairs a second, and how much of its ideal gain the shared prompt brings."""
    sides, more = available(DPO), ["--part", "dpo", *toy(args)]
    plain = {side: how for side, how in sides.items() if "together" in how.settings}
    tried = common.take_turns(SIDES, plain, more, 1, "pairs_per_second")
    rates = {side: runs[0]["pairs_per_second"] for side, runs in tried.runs.items() if runs}
    best = max(rates, key=lambda side: rates[side]) if rates else next(iter(plain))
    sides = {side: how for side, how in sides.items() if side not in plain or side == best}
    turns = common.take_turns(SIDES, sides, more, args.repeats, "pairs_per_second", args.started + 0.85 * LIMIT_S)
    both = list(zip(turns.runs["tuner"], turns.runs["tuner-unshared"], strict=False))
    gains = [shared["pairs_per_second"] / apart["pairs_per_second"] for shared, apart in both]
    ideal = turns.runs["tuner"][0]["ideal_sharing_gain"] if gains else None
    share = statistics.median(gains) / ideal if gains else None
    turns.notes += [
        *tried.notes,
        "the sides divide the pairs into other steps: only the first loss, ln 2, is comparable",
    ]
    finish(
        args, "dpo", "DPO, LoRA, lengths of HH", "pairs_per_second", sides, turns, against=best,
        parity=first_losses(turns, 1), tried_pairs_per_second=rates,
        prefix_sharing={"ideal_gain": ideal, "gains": gains, "share_of_ideal": share},
    )  # fmt: skip


def memory(args: argparse.Namespace) -> None:
    """The longest context: one document, forward, backward and update."""
    sides = available(MEMORY)
    turns = common.take_turns(
        SIDES, sides, ["--part", "memory", *toy(args)], 1, "longest_context_tokens", args.started + 0.7 * LIMIT_S
    )  # fmt: skip
    finish(args, "memory", "longest context, one document", "longest_context_tokens", sides, turns, against="reference")


def trajectory(args: argparse.Namespace) -> None:
    """200 steps on fused and on plain kernels: how far their losses are apart, and whether one side stays ahead."""
    cases = list[dict[str, Any]]()
    for dtype in ("bfloat16", "float32"):
        sides = {name: Side(how) for name, how in TRAJECTORY.items()}
        more = ["--part", "trajectory", "--dtype", dtype, *toy(args)]
        turns = common.take_turns(SIDES, sides, more, 1, "tokens_per_second")
        both = zip(*(turns.runs[side][0]["losses"] for side in ("triton", "reference")), strict=True)
        apart = [fused - plain for fused, plain in both]
        finish(
            args, "trajectory", f"200 steps, {dtype}", "tokens_per_second", sides, turns, against="reference",
            before=cases, parity=first_losses(turns), dtype=dtype,
            difference={
                "mean": statistics.mean(apart),
                "mean_of_the_last_quarter": statistics.mean(apart[-max(1, len(apart) // 4) :]),
                "largest": max(map(abs, apart)),
                "share_above": statistics.mean(d > 0 for d in apart),
            },
        )  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tests": tests, "kernels": kernels, "sft": sft, "dpo": dpo, "trajectory": trajectory, "memory": memory,
}  # fmt: skip


def toy(args: argparse.Namespace) -> list[str]:
    return ["--tiny"] if args.tiny else []


def first_losses(turns: Turns, steps: int = 3) -> dict[str, Sequence[float]]:
    return {side: runs[0]["first_losses"][:steps] for side, runs in turns.runs.items() if runs}


def finish(
    args: argparse.Namespace,
    part: str,
    name: str,
    headline: str,
    sides: Mapping[str, Side],
    turns: Turns,
    *,
    before: list[dict[str, Any]] | None = None,
    against: str | None = None,
    parity: Mapping[str, Sequence[float]] | None = None,
    floor: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Shows a case, and writes it with the cases `before` it."""
    cases = before if before is not None else []
    settings = {"model": "tiny" if args.tiny else "8b", "weights": "random", "dtype": "bfloat16"} | settings
    cases.append(
        common.case(
            name,
            headline,
            sides,
            turns.runs,
            settings=settings,
            against=against,
            parity=parity,
            floor=floor,
            notes=[*turns.notes, *left_out()],
        )  # fmt: skip
    )
    common.show(cases[-1])
    common.write(f"h200-{part}", cases, args.output)


# --- wheels, arguments ---


def unpack(wheels: Path, into: Path) -> list[str]:
    """Puts the wheels of a folder on the path of this process and of those it starts; returns their names."""
    names = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
        names.append(wheel.name)
    sys.path.insert(0, str(into))
    os.environ["BENCH_PATH"] = str(into)
    return names


def run_parts(args: argparse.Namespace) -> None:
    """Each part in a process with a time limit; the exit code is 1 if one of them did not end well."""
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        if args.wheels:
            print("wheels: " + (", ".join(unpack(args.wheels, Path(temporary))) or "none in that folder"))
        print(f"not installed: {', '.join(absent()) or 'nothing of what can be used'}", flush=True)
        for part in args.parts or PARTS:
            print(f"\n--- {part} ---", flush=True)
            command = [sys.executable, __file__, "--part", part, "--repeats", str(args.repeats), *toy(args)]
            command += ["--output", str(args.into / f"h200-{part}.json")]
            try:
                subprocess.run(command, cwd=common.ROOT, check=True, timeout=LIMIT_S, env=common.variables("default"))
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                print(f"{part}: {error}", flush=True)
                failed.append(part)
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/h200", description=str(__doc__).splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="a toy shape: whether it runs, on any machine")
    parser.add_argument("--repeats", type=common.count, default=3, help="turns of each side")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("BENCH_WHEELS"), help="a folder of wheels to use")
    parser.add_argument("--into", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        args.started = time.monotonic()
        PARTS[args.part](args)
        return
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if args.wheels and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: no wheels in {args.wheels}")
    args.into = args.into.resolve()
    try:
        common.output(str(args.into / f"h200-{(args.parts or list(PARTS))[0]}.json"))
    except argparse.ArgumentTypeError as error:  # or every part would measure for nothing
        parser.error(f"--into: {error}")
    run_parts(args)


if __name__ == "__main__":
    common.run(main)
