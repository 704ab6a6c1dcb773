"""Times SFT of tuner against TRL at its defaults and at its best: same machine, model, data and tokens, in turns.

    python scripts/bench/sft.py                          # bundled chats; --data FILE for others
    python scripts/bench/sft.py --ladder                 # also what each of our ideas brings, one after another

Both sides train LoRA over a random 56 M-parameter Llama with about 1,000 tokens an optimizer step, as `workplace.py`
says. TRL's defaults are what `SFTConfig` gives: batches of 8 padded chats, gradient checkpointing, fp32 weights. At its
best it has bf16 weights and no checkpointing, and is the quickest of three ways to batch, each tried first. Then the
floor of `floor.py`, and a profile of where our step goes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models
import workplace
from common import Side

ROW, TOKENS, LEARNING_RATE = 512, 1_024, 2e-4
WARM_UP = 4  # steps not counted

# Each rung takes up one more idea; what is left out is taken away through a knob of the recipe, or by `_without`.
LADDER: dict[str, dict[str, Any]] = {
    "one-at-a-time": {"packing": False, "attention": "sdpa", "without": ("answers", "lora", "modules")},
    "packed": {"packing": True, "attention": "sdpa", "without": ("answers", "lora", "modules")},
    "by-document": {"packing": True, "attention": "auto", "without": ("answers", "lora", "modules")},
    "answers-only": {"packing": True, "attention": "auto", "without": ("lora", "modules")},
    "fused-lora": {"packing": True, "attention": "auto", "without": ("modules",)},
    "tuner": {"packing": True, "attention": "auto", "without": ()},
}
TRL: dict[str, dict[str, Any]] = {
    "trl-default": {},
    "trl-2x512": workplace.BEST | {"packing": True, "per_device_train_batch_size": 2, "max_length": 512},
    "trl-1x1024": workplace.BEST | {"packing": True, "per_device_train_batch_size": 1, "max_length": 1024},
    "trl-8-padded": workplace.BEST | {"per_device_train_batch_size": 8},
}


# --- our side ---


def run_tuner(work: Path, steps: int, rung: str, parity: bool, profiled: bool = False) -> dict[str, Any]:
    """Our side through its recipe, with the ideas of a rung."""
    how = LADDER[rung]
    _without(how["without"])
    changes = {
        "model": {"attn_implementation": how["attention"]},
        "data": {"max_length": ROW, "packing": how["packing"]},
        "train": {"batch_unit": "tokens", "batch_size": TOKENS, "learning_rate": LEARNING_RATE},
    }
    if parity:
        changes["train"] |= {"batch_unit": "examples", "batch_size": workplace.PARITY_ROWS}
    recipe = workplace.recipe_of(work, "parity.jsonl" if parity else "data.jsonl", steps, changes)
    if profiled:
        return {"profile": _profiled(lambda: workplace.run_recipe(work, "sft", recipe), steps)}
    clock = workplace.run_recipe(work, "sft", recipe)
    return clock.result(0 if parity else WARM_UP)


def _without(ideas: tuple[str, ...]) -> None:
    """Takes ideas away, before anything has taken hold of them: the tables of fused modules, and what is scored."""
    if "answers" in ideas:
        from tuner.data import pack

        pack.pack = _all_scored(pack.pack)
    from tuner.model import fuse

    kinds = {"lora": ("lora", "Linear4bit"), "modules": ("RMSNorm", "Attention", "MLP", "DecoderLayer")}
    taken = [mark for idea in ideas for mark in kinds.get(idea, ())]
    for table in (fuse.FUSED, fuse.LAST):
        for original in list(table):
            if any(mark in f"{original.__module__}.{original.__name__}" for mark in taken):
                del table[original]


def _all_scored(pack: Callable[..., Any]) -> Callable[..., Any]:
    """The batch of one who scores every position, and gives those that are no answer the weight 0."""
    from dataclasses import replace

    import torch

    def packed(samples: Any, multiple: int = 1) -> Any:
        batch = pack(samples, multiple)
        at = torch.arange(batch.num_tokens - 1)
        weights = torch.zeros(batch.num_tokens).index_put((batch.predict_at,), batch.weights)[:-1]
        sequence = torch.zeros(batch.num_tokens, dtype=torch.long).index_put((batch.predict_at,), batch.seq_ids)[:-1]
        return replace(batch, predict_at=at, targets=batch.input_ids[1:], weights=weights, seq_ids=sequence)

    return packed


def _profiled(run: Callable[[], object], steps: int) -> dict[str, float]:
    """Shares of self CPU time over the second half of the steps, by kind of operation."""
    import torch

    from tuner.train.loop import Loop

    inner, shares = Loop.step, dict[str, float]()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def step(self: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == steps // 2:
            profiler.__enter__()
        report = inner(self, number, *args, **kwargs)
        if number == steps - 1:
            profiler.__exit__(None, None, None)
        return report

    Loop.step = step  # type: ignore[method-assign]
    run()
    kinds = {
        "matmul": ("aten::mm", "aten::addmm_", "aten::addmm", "aten::linear"),
        "attention and softmax": ("aten::bmm", "aten::_softmax", "aten::_scaled_dot", "aten::masked_fill"),
        "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::empty", "aten::clone"),
        "optimizer and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach"),
    }
    total = 0.0
    for event in profiler.key_averages():
        kind = next((k for k, names in kinds.items() if event.key.startswith(names)), "elementwise and dispatch")
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
        total += event.self_cpu_time_total
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


# --- TRL's side ---


def run_trl(work: Path, steps: int, side: str, parity: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on the same rows; in `parity` all rows of the batch are one step, whatever the batching."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = workplace.read_pairs(work / ("parity.jsonl" if parity else "data.jsonl"))
    dataset = Dataset.from_list(workplace.as_messages(rows))
    settings = {"max_length": ROW, "learning_rate": LEARNING_RATE} | TRL[side]
    if parity and settings.get("packing"):
        settings |= {"per_device_train_batch_size": 1, "max_length": ROW * workplace.PARITY_ROWS}
    config = SFTConfig(**workplace.trl_config(work, steps, settings))
    lora = LoraConfig(r=workplace.RANK, lora_alpha=workplace.ALPHA, target_modules="all-linear")
    trainer = SFTTrainer(model=str(work / "model"), args=config, train_dataset=dataset, peft_config=lora)
    return workplace.run_trl(trainer, fp32_adapters=side != "trl-default").result(0 if parity else WARM_UP)


# --- both sides in turn ---


def measured_floor(shape: models.Shape, runs: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """The floor of our step, and our share of it."""
    import torch
    from floor import floor, mfu, model_flops
    from transformers import AutoTokenizer

    last = runs[-1]
    tokens, scored = round(last["tokens_per_step"]), round(last["trained_tokens_per_step"])
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows = workplace.read_pairs(work / "data.jsonl", 64)
    mean = statistics.mean(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 10 for row in rows)
    lengths = [round(mean)] * max(1, round(tokens / mean))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    least = floor(shape, tokens=tokens, scored=scored, lengths=lengths, trains="lora", device=device)
    seconds = statistics.median(run["step_seconds"] for run in runs)
    flops = model_flops(shape, tokens, scored, lengths, workplace.RANK)
    return {
        **least,
        "step_seconds": seconds,
        "share": least["seconds"] / seconds,
        "model_flops": flops,
        "mfu": mfu(flops, seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, default=common.ROOT / "data" / "chat-train.jsonl")
    parser.add_argument("--model", choices=models.SHAPES, default="56m", help="shape of the random Llama")
    parser.add_argument("--repeats", type=common.count, default=5, help="processes a side")
    parser.add_argument("--steps", type=common.count, default=16, help="optimizer steps a process")
    parser.add_argument("--ladder", action="store_true", help="also our side with its ideas taken away")
    parser.add_argument("--trl-environment", choices=["tuner", "default"], default="tuner", help="variables of TRL")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/sft.json")
    parser.add_argument("--side", choices=[*LADDER, *TRL, "profile"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        warnings.filterwarnings("ignore")
        if args.side in TRL:
            common.answer(run_trl(args.work, args.steps, args.side, args.parity))
        else:
            rung = "tuner" if args.side == "profile" else args.side
            common.answer(run_tuner(args.work, args.steps, rung, args.parity, profiled=args.side == "profile"))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = workplace.read_pairs(args.data, limit=1200)
        workplace.write_rows(work / "data.jsonl", rows)
        workplace.write_rows(work / "parity.jsonl", rows[: workplace.PARITY_ROWS])
        workplace.make_model(work / "model", [text for row in rows for text in row.values()], models.SHAPES[args.model])
        arguments = ["--work", str(work), "--steps", str(args.steps)]
        trl = {side: Side(settings, args.trl_environment) for side, settings in TRL.items()}
        best, tried = workplace.quickest(
            __file__, {side: how for side, how in trl.items() if side != "trl-default"}, arguments, "tokens_per_second"
        )
        ours = {rung: Side(how) for rung, how in LADDER.items() if args.ladder or rung == "tuner"}
        sides = {**ours, "trl-default": trl["trl-default"], best: trl[best]}
        turns = common.take_turns(__file__, sides, arguments, args.repeats, "tokens_per_second")
        few = ["--work", str(work), "--steps", str(workplace.PARITY_STEPS)]
        losses = workplace.parity(__file__, sides, turns, few)
        profile = common.child(__file__, "profile", "--work", str(work), "--steps", "8")["profile"]
        least = measured_floor(models.SHAPES[args.model], turns.runs["tuner"], work)
    settings = {
        "data": args.data.name, "model": args.model, "adapter": f"LoRA r={workplace.RANK} on every linear, fp32",
        "tokens_a_step": TOKENS, "steps": args.steps, "warm_up_steps": WARM_UP, "dtype": "bfloat16",
        "learning_rate": LEARNING_RATE, "trl_tried_tokens_per_second": tried, "our_step_goes_to": profile,
    }  # fmt: skip
    one = common.case(
        "SFT, LoRA",
        "tokens_per_second",
        sides,
        turns.runs,
        settings=settings,
        against=best,
        parity=losses,
        floor=least,
        notes=["weights are random; parity is on one batch of 8 chats, three steps", *turns.notes],
    )
    common.show(one)
    print("our step goes to: " + ", ".join(f"{kind} {value:.0%}" for kind, value in profile.items()))
    common.write("sft", [one], args.output)


if __name__ == "__main__":
    common.run(main)
