"""What the benchmarks over pairs (`dpo.py`, `reward.py`) share: the pairs, the recipe, TRL's settings, and the order.

8 pairs an optimizer step, rows of at most 1,024 tokens, and each side sees every pair of the file once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import models
import workplace

from tuner.errors import UserError

PAIRS, LENGTH, LEARNING_RATE = 8, 1024, 1e-5
WARM_UP = 2  # steps not counted
BATCHES = (1, 2, 4, 8)  # pairs at a time, of TRL at its best


def usable(path: Path, limit: int) -> list[dict[str, Any]]:
    """Pairs with one prompt and one last answer each, as {prompt, chosen, rejected} lists of messages."""
    from tuner.data.formats import detect, parser
    from tuner.data.source import rows
    from tuner.recipe import DataSource

    found: list[dict[str, Any]] = []
    for _, row in rows(DataSource(path=str(path))):
        example = parser(detect(row).name)(row)
        if len(example.completions) != 2:
            raise UserError(f"{path}: rows of {len(example.completions)} answers are no pairs; give preference data")
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


def run_ours(work: Path, stage: str, steps: int, parity: bool, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Our side through its recipe, `changes` in it."""
    shared = {
        "data": {"max_length": LENGTH},
        "train": {"batch_size": PAIRS, "learning_rate": LEARNING_RATE},
    }
    recipe = workplace.recipe_of(work, name_of(parity), steps, workplace.deep(shared, changes))
    if stage == "reward":
        del recipe["data"]["overlong"]  # none is: `reward.py` has left them out
    return workplace.run_recipe(work, stage, recipe).result(0 if parity else WARM_UP, pairs=PAIRS)


def trl_settings(batch: int | None) -> dict[str, Any]:
    """Of a TRL config: its defaults, in as many pairs a step as ours; or its best, `batch` pairs at a time."""
    settings = {"max_length": LENGTH, "learning_rate": LEARNING_RATE, "per_device_train_batch_size": PAIRS}
    if batch is None:
        return settings
    return (
        settings
        | workplace.BEST
        | {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": PAIRS // batch,
        }
    )


def trl_data(work: Path, parity: bool) -> Any:
    """The pairs as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in (work / name_of(parity)).open(encoding="utf-8")])


def name_of(parity: bool) -> str:
    return "parity.jsonl" if parity else "pairs.jsonl"


def arguments(description: str, sides: Sequence[str]) -> argparse.ArgumentParser:
    """What every one of the benchmarks takes."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, default=common.ROOT / "data" / "pref-train.jsonl")
    parser.add_argument("--model", choices=models.SHAPES, default="56m", help="shape of the random Llama")
    parser.add_argument("--repeats", type=common.count, default=5, help="processes a side")
    parser.add_argument("--steps", type=common.count, default=10, help="optimizer steps a process")
    parser.add_argument("--trl-environment", choices=["tuner", "default"], default="tuner", help="variables of TRL")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/NAME.json")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    return parser


@contextmanager
def prepared(pairs: Sequence[dict[str, Any]], shape: models.Shape) -> Iterator[Path]:
    """A folder with the random model, whose tokenizer is trained on the texts of `pairs`."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        texts = [m["content"] for pair in pairs for turns in pair.values() for m in turns]
        workplace.make_model(work / "model", texts, shape)
        yield work


def write_pairs(work: Path, pairs: Sequence[dict[str, Any]], steps: int) -> None:
    """As many pairs as the steps take, so that both sides see the same ones, in whatever order."""
    if len(pairs) < PAIRS * steps:
        raise UserError(f"{len(pairs)} pairs are not enough for {steps} steps of {PAIRS}; lower --steps")
    workplace.write_rows(work / "pairs.jsonl", pairs[: PAIRS * steps])
    workplace.write_rows(work / "parity.jsonl", pairs[:PAIRS])


def settings(args: argparse.Namespace, tried: Mapping[str, float]) -> dict[str, Any]:
    """What all sides have in common, for the record."""
    return {
        "data": args.data.name, "model": args.model, "adapter": f"LoRA r={workplace.RANK} on every linear, fp32",
        "pairs_a_step": PAIRS, "steps": args.steps, "warm_up_steps": WARM_UP, "max_length": LENGTH,
        "learning_rate": LEARNING_RATE, "dtype": "bfloat16", "trl_tried_pairs_per_second": dict(tried),
    }  # fmt: skip
