"""What a training step cannot do without: its FLOPs by the convention of NeMo, and the seconds of its matmuls here.

Model FLOPs (NeMo's convention, so that figures can be compared): a forward is 2 FLOPs for each parameter of a linear
and token, the head's at the positions that are scored, and 4 D for each head and each query-key pair that may see each
other (causal attention is halved, and documents of a row do not see each other). Full fine-tuning is 3 forwards; LoRA
3 (2 + lora / frozen) / 3, for a frozen weight needs no gradient. What is recomputed earns no credit. MFU on a Hopper
GPU is over its peak in bf16 without sparsity, 989 TFLOP/s. On a CPU there is no peak worth the name; there the share of
the floor says the same better.

The floor is in seconds: every matmul at the rate measured here for its very shape, forward, gradient of the input, and
gradient of the weight where it trains; the head at the scored positions; and attention at the quickest that torch has.
Elementwise work, adapters and the optimizer are not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from models import Shape
from torch import Tensor

HOPPER_PEAK = 989e12  # FLOP/s, bf16, dense


def pairs_seen(lengths: Sequence[int]) -> int:
    """Query-key pairs of causal attention inside of documents of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def model_flops(shape: Shape, tokens: int, scored: int, lengths: Sequence[int], lora_rank: int | None) -> float:
    """FLOPs of a training step over `tokens`, of which `scored` are targets; `lora_rank` None is full fine-tuning."""
    forward = 2.0 * tokens * shape.layer_parameters + 2.0 * scored * shape.head_parameters
    forward += 4.0 * shape.hidden * shape.layers * pairs_seen(lengths)
    if lora_rank is None:
        return 3.0 * forward
    frozen = shape.layer_parameters + shape.head_parameters * (1 if shape.tied else 2)
    return forward * (2.0 + shape.lora_parameters(lora_rank) / frozen)


def mfu(flops: float, seconds: float) -> float | None:
    """Share of the peak of a Hopper GPU; None on any other machine."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return flops / seconds / HOPPER_PEAK if hopper else None


# --- measuring ---


def timed(call: Callable[[], object], device: torch.device, repeats: int = 7, warm_up: int = 2) -> list[float]:
    """Seconds of each of `repeats` calls, after some that are not counted."""
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def floor(
    shape: Shape,
    *,
    tokens: int,
    scored: int,
    lengths: Sequence[int],
    trains: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Seconds of one microbatch of `tokens` in documents of `lengths`; `trains` is `lora` or `full`.

    The first layer's input needs no gradient, but its linears' adapters do; that saving is not taken.
    """
    work = [(tokens, size, shape.layers) for size in shape.linears().values()]
    work.append((scored, (shape.vocab, shape.hidden), 1))
    seconds = flops = 0.0
    for rows, (out, inner), times in work:
        best = _matmul_seconds(rows, out, inner, trains, device, dtype)
        seconds += times * best
        flops += times * 2.0 * rows * out * inner * (3 if trains == "full" else 2)
    attention = shape.layers * _attention_seconds(shape, lengths, device, dtype)
    return {
        "seconds": seconds + attention,
        "matmul_seconds": seconds,
        "attention_seconds": attention,
        "matmul_flops": flops,
        "matmul_flops_per_second": flops / seconds,
        "tokens": tokens,
        "scored": scored,
        "trains": trains,
    }


def _matmul_seconds(rows: int, out: int, inner: int, trains: str, device: torch.device, dtype: torch.dtype) -> float:
    """Forward, gradient of the input, and of the weight in full fine-tuning; the best time of each."""
    x = torch.randn(rows, inner, device=device).to(dtype)
    w = torch.randn(out, inner, device=device).to(dtype)
    y, gx, gw = (torch.empty(size, dtype=dtype, device=device) for size in ((rows, out), (rows, inner), (out, inner)))
    calls: list[Callable[[], Tensor]] = [lambda: torch.mm(x, w.T, out=y), lambda: torch.mm(y, w, out=gx)]
    if trains == "full":
        calls.append(lambda: torch.mm(y.T, x, out=gw))
    return sum(min(timed(call, device)) for call in calls)


def _attention_seconds(shape: Shape, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward of one layer over documents of the mean length: the quickest of torch's fused attention
    and the six plain matmuls that it is made of."""
    length = max(1, round(statistics.mean(lengths)))
    documents = max(1, round(sum(lengths) / length))
    sizes = [(documents, heads, length, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes)

    def fused() -> None:
        grouped = shape.heads != shape.kv_heads
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        output.backward(output.detach())

    best = min(timed(fused, device, repeats=5))
    if length > 1024:  # where the scores would not fit a cache
        return best
    groups = documents * shape.kv_heads
    rows = torch.randn(groups, length * (shape.heads // shape.kv_heads), shape.head_dim, device=device).to(dtype)
    keys = torch.randn(groups, length, shape.head_dim, device=device).to(dtype)
    scores = torch.bmm(rows, keys.transpose(1, 2))

    def plain() -> None:
        for _ in range(2):  # the scores and their gradient
            torch.bmm(rows, keys.transpose(1, 2))
            torch.bmm(scores, keys)
            torch.bmm(scores.transpose(1, 2), rows)

    return min(best, *timed(plain, device, repeats=5))
