"""What the benchmarks over pairs (`dpo.py`, `reward.py`) share: the pairs, one side in a process, turns and the table.

Both sides train LoRA (r=16 on every linear, fp32 adapters) over the random 56 M-parameter Llama of `sft.py`, 8 pairs an
optimizer step, bf16 compute, and each sees every pair of the file once. Every repeat is a fresh process, the sides take
turns, and the first steps are not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sft  # puts the repository on the path

from tuner import cli

PAIRS, LENGTH, LEARNING_RATE = 8, 1024, 1e-5
WARM_UP = 2  # steps not counted


def usable(path: Path, limit: int) -> list[dict[str, Any]]:
    """Pairs with one prompt and one last answer each, as {prompt, chosen, rejected} lists of messages."""
    from tuner.data.formats import detect, parser
    from tuner.data.source import rows
    from tuner.recipe import DataSource

    found: list[dict[str, Any]] = []
    for _, row in rows(DataSource(path=str(path))):
        example = parser(detect(row).name)(row)
        chosen, rejected = example.completions
        said = all(part[0].content.strip() for part in (chosen, rejected))
        if len(chosen) == len(rejected) == 1 and said and chosen != rejected:
            turns = [
                [{"role": m.role, "content": m.content} for m in part] for part in (example.prompt, chosen, rejected)
            ]
            found.append(dict(zip(("prompt", "chosen", "rejected"), turns, strict=True)))
        if len(found) == limit:
            break
    return found


# --- one side, in a process of its own ---


class Clock(sft.Clock):
    """Wall-clock time of every step, and the losses of the first two."""

    def result(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)][WARM_UP:]
        seconds = sum(steps)
        peak = sft.resource.getrusage(sft.resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "pairs_per_second": PAIRS * len(steps) / seconds,
            "peak_memory_bytes": peak,
            "first_losses": self.losses[:2],
        }


def run_recipe(work: Path, stage: str, steps: int, sections: str, data: str = "") -> dict[str, Any]:
    """Our side, through the same recipe and stage as the command line.

    Args:
        sections: lines of the recipe that are of this benchmark, the loss among them.
        data: further keys of its data section.
    """
    from tuner import recipe as recipes
    from tuner.train import loop, metrics

    recipe = work / f"recipe-{os.getpid()}.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {work / 'model'}, dtype: bfloat16}}\n"
        f"adapter: {{r: {sft.RANK}, lora_alpha: {sft.ALPHA}}}\n"
        f"data: {{train: {work / 'pairs.jsonl'}, chat_template: llama3, max_length: {LENGTH}, cache: false,\n"
        f"        {data}}}\n"
        f"{sections}\n"
        f"train: {{output_dir: {work / f'run-{os.getpid()}'}, batch_size: {PAIRS}, learning_rate: {LEARNING_RATE},\n"
        f"        lr_scheduler_type: constant, warmup_steps: 0, max_steps: {steps}}}\n"
        f"log: {{save_steps: {10 * steps}}}\n"
    )
    clock, note, start = Clock(), metrics.Metrics.step, metrics.Metrics.start

    def timed(self: metrics.Metrics, step: int, report: loop.StepReport) -> None:
        clock.times.append(time.perf_counter())
        clock.losses.append(next(iter(report.losses.values())))
        note(self, step, report)

    def first(self: metrics.Metrics, step: int) -> None:
        clock.times[0] = time.perf_counter()
        start(self, step)

    metrics.Metrics.step, metrics.Metrics.start = timed, first  # type: ignore[method-assign]
    importlib.import_module(f"tuner.stages.{stage}").run(recipes.load(recipe, stage=stage))
    return clock.result()


def trl_settings(work: Path, steps: int, batch: int) -> dict[str, Any]:
    """Arguments of a TRL config, `batch` pairs at a time: what was quickest on a CPU."""
    return {
        "output_dir": str(work / f"trl-{os.getpid()}"), "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": PAIRS // batch, "max_steps": steps, "max_length": LENGTH, "bf16": True,
        "gradient_checkpointing": False, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "model_init_kwargs": {"dtype": "bfloat16"}, "disable_tqdm": True,
    }  # fmt: skip


def trl_data(work: Path) -> Any:
    """The pairs as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in (work / "pairs.jsonl").open(encoding="utf-8")])


def time_trl(trainer: Any) -> dict[str, Any]:
    """Trains with a TRL trainer whose adapters are put in fp32, as ours are."""
    from transformers import TrainerCallback

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    clock = Clock()

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.times[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.times.append(time.perf_counter())

    trainer.add_callback(Timer())
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.result()


# --- both sides in turn ---


def arguments(description: str, sides: Sequence[str]) -> argparse.ArgumentParser:
    """What every one of the benchmarks takes; also sets the environment, of both sides, as our command line does."""
    cli.set_environment()  # before torch is loaded
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, default=sft.ROOT / "data" / "pref-train.jsonl")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a process")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


@contextmanager
def workplace(pairs: Sequence[dict[str, Any]]) -> Iterator[Path]:
    """A folder with the random model, whose tokenizer is trained on the texts of `pairs`."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        sft.make_model(work / "model", [{"text": m["content"]} for p in pairs for turns in p.values() for m in turns])
        yield work


def write_pairs(work: Path, pairs: Sequence[dict[str, Any]], steps: int) -> None:
    """As many pairs as the steps take, so that both sides see the same ones, in whatever order."""
    if len(pairs) < PAIRS * steps:
        sys.exit(f"{len(pairs)} pairs are not enough for {steps} steps of {PAIRS}; lower --steps")
    with (work / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs[: PAIRS * steps])


def child(script: str, side: str, work: Path, steps: int) -> dict[str, Any]:
    """Runs one side in a fresh process and reads the JSON in its last line."""
    command = [sys.executable, script, "--side", side, "--work", str(work), "--steps", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(sft.ROOT), "TUNER_CACHE": str(work / f"cache-{time.time_ns()}")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def take_turns(script: str, sides: Sequence[str], work: Path, repeats: int, steps: int) -> dict[str, list[Any]]:
    """The results of each side, `repeats` of them; the last side is TRL."""
    results: dict[str, list[Any]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides:
            results[side].append(child(script, side, work, steps))
            print(f"{repeat + 1}/{repeats} {side:<9}{results[side][-1]['pairs_per_second']:>6.2f} pairs/s", flush=True)
    return results


def report(results: dict[str, list[Any]], out: Path | None) -> None:
    """The table, and the ratios pair by pair to the last side, which is TRL."""
    print(f"\n{'':<10}{'pairs/s':>8}  {'(min - max)':<16}{'peak memory':>12}  first losses")
    for side, runs in results.items():
        median, low, high = sft.spread(runs, "pairs_per_second")
        memory = sft.spread(runs, "peak_memory_bytes")[0] / 1e9
        losses = ", ".join(f"{loss:.4f}" for loss in runs[-1]["first_losses"])
        print(f"{side:<10}{median:>8.2f}  {f'({low:.2f} - {high:.2f})':<16}{memory:>9.2f} GB  {losses}")
    *ours, trl = results
    ratios: dict[str, list[float]] = {}
    for side in ours:
        turns = zip(results[side], results[trl], strict=True)
        ratios[side] = sorted(a["pairs_per_second"] / b["pairs_per_second"] for a, b in turns)
        middle = sft.statistics.median(ratios[side])
        print(f"{side} over TRL, turn by turn: {middle:.2f} ({ratios[side][0]:.2f} - {ratios[side][-1]:.2f})")
    if out:
        out.write_text(json.dumps({"runs": results, "ratios": ratios}, indent=1), encoding="utf-8")
