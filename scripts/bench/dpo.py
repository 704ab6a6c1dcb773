"""Times one DPO step of tuner against TRL: same pairs a step, model, truncation and adapter, in one interleaved run.

    python scripts/bench/dpo.py --data my_pairs.jsonl [--repeats 5] [--ladder] [--json result.json]

Both sides train LoRA (r=16 on every linear, fp32 adapters) over the random 56 M-parameter Llama of `sft.py`, 8 pairs an
optimizer step, rows of at most 1,024 tokens, the reference computed in every step by the model without its adapter,
bf16 compute. TRL at the settings that were quickest on a CPU: bf16 weights, no gradient checkpointing, one pair at a
time. Every repeat is a fresh process, the sides take turns, and the first steps are not counted. `--ladder` adds our
side with its ideas taken away (one pair at a time; packed, but each answer with a prompt of its own) and with the
reference's log-probs kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import sft

PAIRS, LENGTH, BETA, LEARNING_RATE = 8, 1024, 0.1, 1e-5
WARM_UP = 2  # steps not counted
LADDER = ("alone", "unshared", "tuner", "cached")


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


def run_tuner(work: Path, steps: int, idea: str) -> dict[str, Any]:
    """Our side, through the same recipe and stage as the command line."""
    from tuner import cli
    from tuner import recipe as recipes

    cli.set_environment()  # before torch is loaded, as the command does
    from tuner.stages import dpo
    from tuner.train import loop, metrics

    recipe = work / f"recipe-{os.getpid()}.yaml"
    packing = "false" if idea == "alone" else "true"
    cached = "true" if idea == "cached" else "false"
    recipe.write_text(
        f"model: {{name_or_path: {work / 'model'}, dtype: bfloat16}}\n"
        f"adapter: {{r: {sft.RANK}, lora_alpha: {sft.ALPHA}}}\n"
        f"data: {{train: {work / 'pairs.jsonl'}, chat_template: llama3, max_length: {LENGTH}, overlong: truncate,\n"
        f"        packing: {packing}, cache: false}}\n"
        f"loss: {{type: sigmoid, beta: {BETA}}}\n"
        f"reference: {{cache: {cached}}}\n"
        f"train: {{output_dir: {work / f'run-{os.getpid()}'}, batch_size: {PAIRS}, learning_rate: {LEARNING_RATE},\n"
        f"        lr_scheduler_type: constant, warmup_steps: 0, max_steps: {steps}}}\n"
        f"log: {{save_steps: {10 * steps}}}\n"
    )
    clock, note, start = Clock(), metrics.Metrics.step, metrics.Metrics.start

    def timed(self: metrics.Metrics, step: int, report: loop.StepReport) -> None:
        clock.times.append(time.perf_counter())
        clock.losses.append(report.losses["sigmoid"])
        note(self, step, report)

    def first(self: metrics.Metrics, step: int) -> None:
        clock.times[0] = time.perf_counter()
        start(self, step)

    metrics.Metrics.step, metrics.Metrics.start = timed, first  # type: ignore[method-assign]
    if idea in ("alone", "unshared"):
        loop.pack = _unshared(loop.pack)  # type: ignore[attr-defined]
    dpo.run(recipes.load(recipe, stage="dpo"))
    return clock.result()


def _unshared(pack: Any) -> Any:
    """The batch that one gets where the prompt is run for each answer: the attention of a pair, twice its prompt."""
    from dataclasses import replace

    import torch

    from tuner.types import Tokens

    def packed(samples: Any, multiple: int = 1) -> Any:
        halves = [Tokens(s.trunk, (branch,), s.source, s.row) for s in samples for branch in s.branches]
        batch = pack(halves, multiple)
        return replace(batch, seq_doc=batch.seq_doc // 2, seq_branch=batch.seq_doc % 2 + torch.ones_like(batch.seq_doc))

    return packed


def run_trl(work: Path, steps: int) -> dict[str, Any]:
    """TRL's DPOTrainer at the settings that were quickest on a CPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    dataset = Dataset.from_list([json.loads(line) for line in (work / "pairs.jsonl").open(encoding="utf-8")])
    config = DPOConfig(
        output_dir=str(work / f"trl-{os.getpid()}"), per_device_train_batch_size=1, gradient_accumulation_steps=PAIRS,
        max_steps=steps, max_length=LENGTH, bf16=True, gradient_checkpointing=False, learning_rate=LEARNING_RATE,
        beta=BETA, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        model_init_kwargs={"dtype": "bfloat16"}, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=sft.RANK, lora_alpha=sft.ALPHA, target_modules="all-linear")
    trainer = DPOTrainer(model=str(work / "model"), args=config, train_dataset=dataset, peft_config=lora)
    for parameter in trainer.model.parameters():  # fp32 adapters on both sides
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


def child(side: str, work: Path, steps: int) -> dict[str, Any]:
    """Runs one side in a fresh process and reads the JSON in its last line."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work), "--steps", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(sft.ROOT), "TUNER_CACHE": str(work / f"cache-{time.time_ns()}")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def report(results: dict[str, list[dict[str, Any]]], out: Path | None) -> None:
    """The table, and the ratios pair by pair."""
    print(f"\n{'':<10}{'pairs/s':>8}  {'(min - max)':<16}{'peak memory':>12}  first losses")
    for side, runs in results.items():
        median, low, high = sft.spread(runs, "pairs_per_second")
        memory = sft.spread(runs, "peak_memory_bytes")[0] / 1e9
        losses = ", ".join(f"{loss:.4f}" for loss in runs[-1]["first_losses"])
        print(f"{side:<10}{median:>8.2f}  {f'({low:.2f} - {high:.2f})':<16}{memory:>9.2f} GB  {losses}")
    ratios: dict[str, list[float]] = {}
    for side in results:
        if side != "trl":
            pairs = zip(results[side], results["trl"], strict=True)
            ratios[side] = sorted(a["pairs_per_second"] / b["pairs_per_second"] for a, b in pairs)
            middle = sft.statistics.median(ratios[side])
            print(f"{side} over TRL, pair by pair: {middle:.2f} ({ratios[side][0]:.2f} - {ratios[side][-1]:.2f})")
    if out:
        out.write_text(json.dumps({"runs": results, "ratios": ratios}, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=sft.ROOT / "data" / "pref-train.jsonl")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a process")
    parser.add_argument("--ladder", action="store_true", help="also our side with its ideas taken away")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=[*LADDER, "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    warnings.filterwarnings("ignore")
    if args.side:
        result = run_trl(args.work, args.steps) if args.side == "trl" else run_tuner(args.work, args.steps, args.side)
        print("\n" + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        pairs = usable(args.data, limit=600)
        with (work / "pairs.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        texts = [{"text": m["content"]} for pair in pairs for turns in pair.values() for m in turns]
        sft.make_model(work / "model", texts)
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in (LADDER if args.ladder else ("tuner",))}
        results["trl"] = []
        for repeat in range(args.repeats):
            for side in results:
                results[side].append(child(side, work, args.steps))
                print(f"{repeat + 1}/{args.repeats} {side:<9}{results[side][-1]['pairs_per_second']:>6.2f} pairs/s")
    report(results, args.json)


if __name__ == "__main__":
    main()
