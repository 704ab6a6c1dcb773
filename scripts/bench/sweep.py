"""How the cost of a token grows with sequence length, documents in a row, trained share, vocabulary and model size.

    python scripts/bench/sweep.py                        # all axes
    python scripts/bench/sweep.py --axes length size     # these

LoRA over a random Llama and random tokens, 4,096 a step; one thing changes at a time, from the 56 M-parameter model,
documents of 256 tokens and a third of the tokens trained. The points of an axis take turns in one process, and every
round is another process. `--trl` adds TRL at its best settings on the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import models
import synthetic
import torch
import workplace
from common import Side
from models import SHAPES, Shape

STEP_TOKENS = 4096
TRL = workplace.BEST | {"packing": False, "padding_free": False}


@dataclass(frozen=True)
class Point:
    """What is trained at one point of an axis."""

    shape: Shape
    lengths: tuple[int, ...]  # of the documents of a step
    trained: float = 1 / 3


def points(axis: str, tokens: int, base: Shape) -> dict[str, Point]:
    """The points of an axis by name."""
    usual = (min(256, tokens),) * max(1, tokens // 256)
    if axis == "length":
        return {f"{n}": Point(base, (n,) * (tokens // n)) for n in (64, 256, 1024, 4096) if n <= tokens}
    if axis == "documents":  # uneven ones, which make one row
        row = min(2048, tokens)
        return {f"{d}": Point(base, _uneven(row, d) * (tokens // row)) for d in (1, 4, 16, 64) if d <= row // 16}
    if axis == "trained":
        return {f"{share:g}": Point(base, usual, share) for share in (1.0, 0.5, 0.2, 0.05)}
    if axis == "vocabulary":
        return {f"{v}": Point(base.changed(vocab=v), usual) for v in (8_000, 32_000, 128_256)}
    return {name: Point(SHAPES[name], usual) for name in ("20m", "56m", "110m")}


AXES = ("length", "documents", "trained", "vocabulary", "size")


def _uneven(row: int, documents: int) -> tuple[int, ...]:
    """Lengths that rise evenly from about a third of the mean, and add up to the row."""
    weights = [1 + 4 * i / documents for i in range(documents)]
    lengths = [max(2, int(row * w / sum(weights))) for w in weights]
    lengths[-1] += row - sum(lengths)
    return tuple(lengths)


def run_tuner(point: Point, steps: int, warm_up: int) -> dict[str, Any]:
    """Microseconds a token of our loop."""
    device = synthetic.find_device()
    policy = synthetic.make_policy(point.shape, synthetic.Method(), device, torch.bfloat16, max(point.lengths))
    samples = synthetic.documents(point.lengths * (steps + warm_up), point.shape.vocab, point.trained)
    found = synthetic.steps(
        policy,
        synthetic.LanguageStage(),
        samples,
        batch_size=len(point.lengths),
        microbatch_tokens=sum(point.lengths),
        count=steps,
        warm_up=warm_up,
    )
    return found | {"microseconds_per_token": 1e6 / found["tokens_per_second"]}


def run_trl(work: Path, point: Point, steps: int, warm_up: int) -> dict[str, Any]:
    """The same by TRL: batches of the same documents, padded, as many at once as make a step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    directory = work / f"model-{point.shape.vocab}-{point.shape.hidden}"
    if not directory.exists():
        workplace.make_model(directory, ["some text"], point.shape)
    rows = []
    for sample in synthetic.documents(point.lengths * (steps + warm_up), point.shape.vocab, point.trained):
        labels = [int(i) if part.trained else -100 for part in sample.trunk for i in part.ids]
        rows.append({"input_ids": sample.ids(), "labels": labels})
    settings = TRL | {"per_device_train_batch_size": len(point.lengths), "max_length": max(point.lengths)}
    config = SFTConfig(**workplace.trl_config(work, steps + warm_up, settings))
    lora = LoraConfig(r=workplace.RANK, lora_alpha=workplace.ALPHA, target_modules="all-linear")
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(model=str(directory), args=config, train_dataset=data, peft_config=lora)
    found = workplace.run_trl(trainer, fp32_adapters=True).result(warm_up)
    return found | {"microseconds_per_token": 1e6 / found["tokens_per_second"]}


def side(args: argparse.Namespace) -> dict[str, Any]:
    """Every point of an axis, one after another."""
    along = points(args.axes[0], args.step_tokens, SHAPES[args.model])
    found: dict[str, Any] = {}
    for name, point in along.items():
        if args.side == "trl":
            found[name] = run_trl(args.work, point, args.steps, args.warm_up)
        else:
            found[name] = run_tuner(point, args.steps, args.warm_up)
        synthetic.free(synthetic.find_device())
    return {"points": found, "seconds": time.process_time()}


def cases_of(axis: str, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A case for each point of an axis."""
    sides = {name: Side(TRL if name == "trl" else {}) for name in (("tuner", "trl") if args.trl else ("tuner",))}
    arguments = ["--axes", axis, "--work", str(work), "--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    arguments += ["--step-tokens", str(args.step_tokens), "--model", args.model]
    turns = common.take_turns(__file__, sides, arguments, args.repeats, "seconds")
    cases = []
    for name, point in points(axis, args.step_tokens, SHAPES[args.model]).items():
        runs = {
            side: [run["points"][name] | {"environment": run["environment"]} for run in measured]
            for side, measured in turns.runs.items()
        }
        settings = {
            "axis": axis, "point": name, "model": args.model if axis != "size" else name, "vocab": point.shape.vocab,
            "documents_a_step": len(point.lengths), "mean_tokens": statistics.mean(point.lengths),
            "trained": point.trained, "steps": args.steps, "warm_up_steps": args.warm_up,
        }  # fmt: skip
        cases.append(
            common.case(
                f"{axis} {name}",
                "microseconds_per_token",
                sides,
                runs,
                settings=settings,
                better="lower",
                against="trl" if args.trl else None,
                notes=turns.notes,
            )  # fmt: skip
        )
    return cases


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--model", choices=models.SHAPES, default="56m", help="the model that the axes start from")
    parser.add_argument("--step-tokens", type=common.count, default=STEP_TOKENS, help="tokens of an optimizer step")
    parser.add_argument("--trl", action="store_true", help="also TRL at its best, on the same tokens")
    parser.add_argument("--repeats", type=common.count, default=3, help="processes an axis and side")
    parser.add_argument("--steps", type=common.count, default=3, help="optimizer steps a point")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them that are not counted")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/sweep.json")
    parser.add_argument("--side", choices=["tuner", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.answer(side(args))
        return
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for axis in args.axes:
            cases += cases_of(axis, args, Path(temporary))
            common.write("sweep", cases, args.output)
    for one in cases:
        common.show(one)


if __name__ == "__main__":
    common.run(main)
