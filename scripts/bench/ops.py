"""Times every operation of tuner/kernels against plain torch, torch.compile, torch's own fused operations and others.

    python scripts/bench/ops.py                      # on a CPU the 56 M model's shape, on a GPU that of an 8B
    python scripts/bench/ops.py --ops rope swiglu --without compile

Forward and backward, every side in turn and again in the next round; median and range over the rounds. Beside each
time: GB/s of the bytes that cannot be spared, or TFLOP/s of the arithmetic, and their share of what a copy or a matmul
reaches here; and the relative error of outputs and gradients against float64, measured on an eighth of the tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import common
import kernel_ops
import synthetic
import torch
from common import Side
from floor import timed
from kernel_ops import OPS, Maker, Op
from models import SHAPES

TOKENS = {"tiny": 128, "8b": 16_384}  # of the others 1,024
QUARTER = ("attention", "token_logps")  # get a quarter of them: their time or memory grows with another size too


def peaks(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, float]:
    """What a copy and a matmul reach here: bytes read and written a second, and FLOP a second."""
    size = 256 if tiny else (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.empty((1 << 20) if tiny else (1 << 28), dtype=torch.uint8, device=device)
    into = torch.empty_like(big)
    matmul = statistics.median(timed(lambda: torch.mm(a, b), device))
    copy = statistics.median(timed(lambda: into.copy_(big), device))
    return {"matmul_flops_per_second": 2.0 * size**3 / matmul, "copy_bytes_per_second": 2.0 * big.numel() / copy}


def with_compiled(op: Op) -> dict[str, kernel_ops.Compute]:
    """The sides of an operation, and `compile` beside `eager`."""
    return op.sides | {"compile": torch.compile(op.sides["eager"], dynamic=False)}


def pass_through(op: Op, side: kernel_ops.Compute) -> Callable[[], object]:
    """Forward and backward of one side, with the gradients that it is given."""
    wanted = [t for t in op.inputs if t.requires_grad]
    if not op.backward:
        return lambda: side(*op.inputs)
    given = [torch.ones_like(y) for y in side(*op.inputs)]
    return lambda: torch.autograd.grad(side(*op.inputs), wanted, given)


def measure(op: Op, small: Op, count: int, args: argparse.Namespace, best: dict[str, float]) -> dict[str, Any]:
    """The case of one operation; a side that does not run is named in the notes."""
    device, notes = synthetic.find_device(), []
    sides = {name: side for name, side in with_compiled(op).items() if name not in args.without}
    exact = kernel_ops.truth(small)
    errors, calls = dict[str, float](), dict[str, tuple[Callable[[], object], Callable[[], object]]]()
    for name, side in list(sides.items()):
        # torch's compiler is given the small inputs too, and makes another program for them
        of_small = with_compiled(small)[name]
        found, why = common.attempt(lambda side=side, of_small=of_small: _prepared(op, small, side, of_small, exact))
        if why is None:
            calls[name], errors[name] = found
        else:
            notes.append(f"{name} did not run: {why}")
            del sides[name]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (forward, whole) in calls.items():
            seconds = statistics.median(timed(whole, device, repeats=args.calls))
            runs[name].append(
                {
                    "seconds": seconds,
                    "forward_seconds": statistics.median(timed(forward, device, repeats=args.calls)),
                    "error": errors[name],
                    **_rates(op, seconds, best),
                }
            )
    settings = {"shape": args.shape, "dtype": "bfloat16", "tokens": count, **op.about, **best}
    settings |= {"counted": "forward and backward" if op.backward else "forward", "calls_a_round": args.calls}
    told = {name: Side() for name in sides}
    against = "eager" if "eager" in sides else None
    return common.case(op.name, "seconds", told, runs, settings=settings, better="lower", against=against, notes=notes)


def _prepared(
    op: Op, small: Op, side: kernel_ops.Compute, of_small: kernel_ops.Compute, exact: list[torch.Tensor]
) -> tuple[tuple[Callable[[], object], Callable[[], object]], float]:
    """(forward, forward and backward) of a side that has run once, and its error."""
    off = kernel_ops.error(small, of_small, exact)
    whole = pass_through(op, side)
    whole()
    return (lambda: side(*op.inputs), whole), off


def _rates(op: Op, seconds: float, best: dict[str, float]) -> dict[str, float]:
    if op.flops:
        rate = op.flops / seconds
        return {"flops_per_second": rate, "share_of_matmul": rate / best["matmul_flops_per_second"]}
    rate = op.moved_bytes / seconds
    return {"bytes_per_second": rate, "share_of_copy": rate / best["copy_bytes_per_second"]}


def show(case: dict[str, Any]) -> None:
    """A case as a table for people."""
    print(f"\n{case['name']} ({', '.join(f'{k} {v}' for k, v in case['settings'].items() if k in ('tokens', 'rows'))})")
    print(f"{'':<28}{'ms':>10}  {'(min - max)':<20}{'forward':>9}{'rate':>17}{'of peak':>9}{'error':>10}")
    for name, side in case["sides"].items():
        if not side["runs"]:
            continue
        median, low, high = common.middle(run["seconds"] * 1e3 for run in side["runs"])
        last = side["runs"][-1]
        unit, rate = next(
            (u, last[k]) for u, k in (("TFLOP/s", "flops_per_second"), ("GB/s", "bytes_per_second")) if k in last
        )
        share = last.get("share_of_matmul", last.get("share_of_copy", math.nan))
        shown = f"{rate / (1e12 if unit == 'TFLOP/s' else 1e9):.3g} {unit}"
        print(
            f"{name:<28}{median:>10.3f}  {f'({low:.3f} - {high:.3f})':<20}{last['forward_seconds'] * 1e3:>9.3f}"
            f"{shown:>17}{share:>9.0%}{last['error']:>10.1e}"
        )
    for note in case["notes"]:
        print(f"note: {note}")


def main() -> None:
    warnings.filterwarnings("ignore")
    device = synthetic.find_device()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shape", choices=SHAPES, default="8b" if device.type == "cuda" else "56m")
    parser.add_argument("--tokens", type=common.count, help="of a row; default: 16,384 of an 8B, else 1,024")
    parser.add_argument("--repeats", type=common.count, default=5, help="rounds")
    parser.add_argument("--calls", type=common.count, default=7, help="calls a round, of which the median counts")
    parser.add_argument("--without", nargs="+", default=[], metavar="SIDE", help="sides to leave out, e.g. compile")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin no operation after so many seconds")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/kernels.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    until = time.monotonic() + args.limit_s
    tokens = args.tokens or TOKENS.get(args.shape, 1024)
    best = peaks(device, torch.bfloat16, args.shape == "tiny")
    cases: list[dict[str, Any]] = []
    for name in args.ops:
        if time.monotonic() > until:
            cases[-1]["notes"].append(f"the time was up before {name}")
            break
        count = tokens // 4 if name.startswith(QUARTER) else tokens
        op, small = (
            OPS[name](Maker(SHAPES[args.shape], device, torch.bfloat16, max(32, n))) for n in (count, count // 8)
        )
        cases.append(measure(op, small, count, args, best))
        show(cases[-1])
        del op, small
        synthetic.free(device)
        torch.compiler.reset()
        common.write("kernels", cases, args.output)


if __name__ == "__main__":
    common.run(main)
