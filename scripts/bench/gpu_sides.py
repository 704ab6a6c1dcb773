"""One side of a part of `gpu.py`, in a process of its own: an 8B Llama with random weights, made on the GPU."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import common
import numpy as np
import synthetic
import torch
from floor import floor, mfu, model_flops
from gpu import DPO, MEMORY, ROW, SFT, TRAJECTORY
from models import SHAPES, Shape

from tuner.data.pack import bins
from tuner.errors import OutOfMemoryError

SHORT_ROW = 128  # in the place of ROW, of a toy
DTYPE = torch.bfloat16


def shape_of(tiny: bool) -> Shape:
    return SHAPES["tiny" if tiny else "8b"]


def method(how: dict[str, Any], tiny: bool) -> synthetic.Method:
    """How a side trains; a toy runs the plain kernels where there is no GPU."""
    backend = "reference" if tiny and not torch.cuda.is_available() else how["backend"]
    return synthetic.Method(how["trains"], backend, how.get("checkpointing", False))


def lengths_of(case: str, whole: int) -> list[int]:
    """Documents of a whole row each; or short ones, a mean of an eighth of a row, the same ones every time."""
    if case == "whole":
        return [whole] * 24
    drawn = np.random.default_rng(0).lognormal(0.0, 0.6, 400) * whole / 9.6
    return [int(n) for n in drawn.clip(8, whole)]


def sft(name: str, tiny: bool, case: str) -> dict[str, Any]:
    """Steps of about 32k tokens, all of them trained."""
    how, shape, device = SFT[name], shape_of(tiny), synthetic.find_device()
    whole, capacity = (SHORT_ROW, 2 * SHORT_ROW) if tiny else (ROW, how["microbatch_tokens"])
    lengths = lengths_of(case, whole)
    policy = synthetic.make_policy(shape, method(how, tiny), device, DTYPE, whole)
    samples, stage = synthetic.documents(lengths, shape.vocab), synthetic.LanguageStage()
    full = [samples[i] for i in bins(lengths, capacity)[0]]
    result = {"activation_bytes_per_token": synthetic.activation_bytes(policy, stage, full)}
    result |= synthetic.steps(
        policy,
        stage,
        samples,
        batch_size=max(1, round((512 if tiny else 32_768) / statistics.mean(lengths))),
        microbatch_tokens=capacity,
        count=2 if tiny else 5,
        warm_up=1 if tiny else 3,
    )
    tokens = sum(lengths)
    flops = model_flops(shape, tokens, tokens, lengths, synthetic.RANK) / tokens
    return result | {
        "microbatch_tokens": capacity,
        "model_flops_per_token": flops,
        "mfu": mfu(flops * result["tokens_per_second"], 1.0),
    }


def sft_floor(tiny: bool, tokens: int) -> dict[str, Any]:
    """The floor of one microbatch of `tokens` in whole rows."""
    whole = SHORT_ROW if tiny else ROW
    return floor(
        shape_of(tiny),
        tokens=tokens,
        scored=tokens,
        lengths=[whole] * (tokens // whole),
        trains="lora",
        device=synthetic.find_device(),
    )


def dpo(name: str, tiny: bool) -> dict[str, Any]:
    """Pairs of HH's lengths, 64 a step; or by plain transformers and peft, padded, without sharing."""
    how, shape, device = DPO[name], shape_of(tiny), synthetic.find_device()
    total, ratio = (40, 2.15) if tiny else synthetic.PAIR_LENGTHS["hh"]
    samples = synthetic.preference_pairs(16 if tiny else 256, shape.vocab, total, ratio)
    warm_up = 1 if tiny else 2
    if "together" in how:
        together = 4 if tiny else how["together"]
        return synthetic.plain_preference(shape, samples, device, DTYPE, together, 2 if tiny else 12, warm_up)
    policy = synthetic.make_policy(shape, method(how, tiny), device, DTYPE, max(map(len, samples)))
    stage = synthetic.PreferenceStage(synthetic.Reference(policy), shared=how["shared"])
    result = synthetic.steps(
        policy,
        stage,
        stage.laid_out(samples),
        batch_size=8 if tiny else 64,
        microbatch_tokens=1024 if tiny else 16_384,
        count=2 if tiny else 4,
        warm_up=warm_up,
    )
    ideal = synthetic.ideal_sharing(samples)
    return result | {"pairs_per_second": result["samples_per_second"], "ideal_sharing_gain": ideal}


def memory(name: str, tiny: bool) -> dict[str, Any]:
    """The longest document that one step can train on, in units of 1,024 tokens, found by trying."""
    how, shape, device = MEMORY[name], shape_of(tiny), synthetic.find_device()
    unit, most = (64, 256) if tiny else (1024, 1 << 20)
    policy = synthetic.make_policy(shape, method(how, tiny), device, DTYPE, most)
    stage, last = synthetic.LanguageStage(), dict[str, Any]()

    def fits(units: int) -> bool:
        tokens = units * unit
        samples = synthetic.documents([tokens], shape.vocab)
        try:
            found = synthetic.steps(policy, stage, samples, batch_size=1, microbatch_tokens=tokens, count=1, warm_up=0)
        except (OutOfMemoryError, torch.OutOfMemoryError):
            policy.zero_grad(set_to_none=True)
            synthetic.free(device)
            return False
        last.update(found)
        print(f"{name}: {tokens:,} tokens fit", file=sys.stderr, flush=True)
        return True

    until = time.monotonic() + 100
    longest = unit * synthetic.most_that_fits(fits, 1, most // unit, until)
    return {**last, "longest_context_tokens": longest}


def trajectory(name: str, tiny: bool, dtype: str) -> dict[str, Any]:
    """The loss of each of many steps that learn 64 random documents by heart."""
    shape, device = SHAPES["tiny" if tiny else "56m"], synthetic.find_device()
    backend = "reference" if tiny and device.type == "cpu" else TRAJECTORY[name]["backend"]
    policy = synthetic.make_policy(shape, synthetic.Method("lora", backend), device, getattr(torch, dtype), 512)
    lengths = [int(n) for n in np.random.default_rng(0).integers(8, 48 if tiny else 400, 64)]
    return synthetic.steps(
        policy,
        synthetic.LanguageStage(),
        synthetic.documents(lengths, shape.vocab, trained=0.5),
        batch_size=8,
        microbatch_tokens=4096,
        count=4 if tiny else 199,
        warm_up=1,
        every_loss=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", required=True)
    parser.add_argument("--part", choices=["sft", "floor", "dpo", "memory", "trajectory"], required=True)
    parser.add_argument("--case", choices=["whole", "short"])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.part == "sft":
        common.answer(sft(args.side, args.tiny, args.case))
    elif args.part == "floor":
        common.answer(sft_floor(args.tiny, args.tokens))
    elif args.part == "trajectory":
        common.answer(trajectory(args.side, args.tiny, args.dtype))
    else:
        common.answer({"dpo": dpo, "memory": memory}[args.part](args.side, args.tiny))


if __name__ == "__main__":
    main()
