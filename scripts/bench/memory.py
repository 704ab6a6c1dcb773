"""Peak memory at fixed work, and the longest context that fits a budget: ours against TRL, each in its own process.

    python scripts/bench/memory.py                       # full, LoRA and QLoRA, with and without checkpointing
    python scripts/bench/memory.py --budget-gb 4         # also the longest document that one step can train on

The work is three optimizer steps over rows of random tokens, all trained. On a CPU the peak is that of the whole
process, libraries included: what a machine needs. A context counts as fitting where that stays within the budget; on a
GPU where the step does not run out of memory (`scripts/bench/h200 memory`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import models
import synthetic
import torch
import workplace
from common import Side

STEPS = 3
SIDES: dict[str, dict[str, Any]] = {
    "tuner": {"checkpointing": False},
    "tuner-selective": {"checkpointing": "selective"},
    "tuner-checkpointing": {"checkpointing": True},
    "trl": {"checkpointing": False},
    "trl-checkpointing": {"checkpointing": True},
}


def run_tuner(
    shape: models.Shape, trains: str, checkpointing: bool | str, lengths: list[int], steps: int
) -> dict[str, Any]:
    """Steps of our loop over all rows at once."""
    method = synthetic.Method(trains, "auto", checkpointing)
    policy = synthetic.make_policy(shape, method, synthetic.find_device(), torch.bfloat16, max(lengths))
    samples = synthetic.documents(lengths * steps, shape.vocab)
    return synthetic.steps(
        policy,
        synthetic.LanguageStage(),
        samples,
        batch_size=len(lengths),
        microbatch_tokens=sum(lengths),
        count=steps,
        warm_up=0,
    )


def run_trl(work: Path, trains: str, checkpointing: bool, lengths: list[int], steps: int) -> dict[str, Any]:
    """The same rows by TRL's trainer at its best settings: all at once, bf16."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    vocab = AutoConfig.from_pretrained(work / "model").vocab_size
    rows = [{"input_ids": sample.ids()} for sample in synthetic.documents(lengths * steps, vocab)]
    how: dict[str, Any] = {"dtype": "float32" if trains == "full" else "bfloat16"}
    if trains == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    settings = workplace.BEST | {
        "gradient_checkpointing": checkpointing,
        "model_init_kwargs": how,
        "per_device_train_batch_size": len(lengths),
        "max_length": max(lengths),
        "learning_rate": synthetic.RATE,
    }
    config = SFTConfig(**workplace.trl_config(work, steps, settings))
    lora = LoraConfig(r=workplace.RANK, lora_alpha=workplace.ALPHA, target_modules="all-linear")
    trainer = SFTTrainer(
        model=str(work / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=None if trains == "full" else lora,
    )
    return workplace.run_trl(trainer, fp32_adapters=trains != "full").result(0)


def fixed_work(args: argparse.Namespace, work: Path, trains: str) -> dict[str, Any]:
    """The case of one way to train: peak memory of every side."""
    sides = {side: Side(how) for side, how in SIDES.items()}
    arguments = ["--work", str(work), "--model", args.model, "--trains", trains, "--tokens", str(args.tokens)]
    turns = common.take_turns(__file__, sides, arguments, args.repeats, "peak_memory_bytes")
    settings = {"model": args.model, "trains": trains, "rows": 2, "tokens_a_row": args.tokens, "steps": STEPS}
    notes = ["random weights and tokens, all trained", *turns.notes]
    return common.case(
        f"peak memory, {trains}", "peak_memory_bytes", sides, turns.runs, settings=settings, better="lower",
        against="trl", notes=notes,
    )  # fmt: skip


def longest(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The case of the longest context within the budget: LoRA, one document, one step."""
    unit, budget, notes = 256, args.budget_gb * 1e9, list[str]()
    runs: dict[str, list[dict[str, Any]]] = {}

    for side in SIDES:
        seen: dict[str, Any] = {}

        def fits(units: int, side: str = side, seen: dict[str, Any] = seen) -> bool:
            arguments = ["--work", str(work), "--model", args.model, "--trains", "lora", "--context", str(units * unit)]
            try:
                found = common.child(__file__, side, *arguments)
            except common.ChildFailed as error:
                notes.append(f"{units * unit:,} tokens: {error}")
                return False
            within = bool(found["peak_memory_bytes"] <= budget)
            print(f"{side}: {units * unit:,} tokens, {found['peak_memory_bytes'] / 1e9:.2f} GB", flush=True)
            if within:
                seen |= found
            return within

        until = time.monotonic() + args.limit_s
        tokens = unit * synthetic.most_that_fits(fits, 1, args.most // unit, until)
        runs[side] = [seen | {"longest_context_tokens": tokens}]
    settings = {"model": args.model, "trains": "lora", "budget_bytes": budget, "most_tried_tokens": args.most}
    return common.case(
        f"longest context in {args.budget_gb:g} GB", "longest_context_tokens", {s: Side(h) for s, h in SIDES.items()},
        runs, settings=settings, against="trl", notes=["to a sixteenth", *notes],
    )  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=models.SHAPES, default="56m", help="shape of the random Llama")
    parser.add_argument("--trains", nargs="+", choices=["full", "lora", "qlora"], default=["full", "lora", "qlora"])
    parser.add_argument("--tokens", type=common.count, default=1024, help="of each of the two rows of a step")
    parser.add_argument("--repeats", type=common.count, default=3, help="processes a side")
    parser.add_argument("--budget-gb", type=float, help="also search the longest context within so many GB")
    parser.add_argument("--most", type=int, default=65_536, help="longest context that is tried")
    parser.add_argument("--limit-s", type=float, default=600, help="seconds of the search, for each side")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/memory.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        lengths, steps = ([args.context], 1) if args.context else ([args.tokens] * 2, STEPS)
        trains, checkpointing = args.trains[0], SIDES[args.side]["checkpointing"]
        if args.side.startswith("trl"):
            common.answer(run_trl(args.work, trains, checkpointing, lengths, steps))
        else:
            common.answer(run_tuner(models.SHAPES[args.model], trains, checkpointing, lengths, steps))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["TUNER_CACHE"] = str(work / "cache")
        workplace.make_model(work / "model", ["some text"], models.SHAPES[args.model])
        cases = [fixed_work(args, work, trains) for trains in args.trains]
        cases += [longest(args, work)] if args.budget_gb else []
    for one in cases:
        common.show(one)
    common.write("memory", cases, args.output)


if __name__ == "__main__":
    common.run(main)
