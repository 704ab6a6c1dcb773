"""A random Llama and random tokens in memory -> training steps of tuner's pieces, or of plain transformers and peft.

What runs here needs no data, no recipe and no TRL: the policy, the packing and the loop of tuner, over a model that is
made on its device. So it also runs on a GPU machine that lacks what reads recipes and data.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from models import Shape
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tuner import kernels
from tuner.data.pack import pack, weight_sum
from tuner.data.plan import Plan
from tuner.model.fuse import Recompute, fuse
from tuner.model.policy import Policy
from tuner.model.reference import Reference
from tuner.train.loop import LAG, ROW_MULTIPLE, Loop, Progress, StepReport
from tuner.train.optim import clip
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens, span

RANK, ALPHA, BETA = 16, 32, 0.1
RATE = 1e-4
# Median tokens of published preference sets (total of an example, prompt over answer): Anthropic's HH among them.
PAIR_LENGTHS = {"hh": (186, 2.15), "ultrafeedback": (409, 0.42), "metamath": (872, 3.91), "capybara": (1160, 1.59)}


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- data ---


def documents(lengths: Sequence[int], vocab: int, trained: float = 1.0, seed: int = 0) -> list[Tokens]:
    """Samples of these lengths: a prompt that is not trained, and an answer with the share `trained` of the tokens."""
    rng = np.random.default_rng(seed)
    samples = []
    for row, n in enumerate(lengths):
        ids = rng.integers(8, vocab, n)
        prompt = min(n - 1, round(n * (1.0 - trained)))
        spans = (span(ids[:prompt], False), span(ids[prompt:], True)) if prompt else (span(ids, True),)
        samples.append(Tokens(spans, (), "random", row))
    return samples


def preference_pairs(count: int, vocab: int, total: int, ratio: float, seed: int = 0) -> list[Tokens]:
    """Pairs of one prompt and two answers whose lengths scatter around the medians `total` and `ratio`."""
    rng = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        whole = max(8.0, total * math.exp(rng.normal(0.0, 0.5)))
        prompt = max(2, round(whole * ratio / (1.0 + ratio)))
        answers = [max(2, round(whole / (1.0 + ratio) * math.exp(rng.normal(0.0, 0.3)))) for _ in range(2)]
        branches = tuple((span(rng.integers(8, vocab, n), True),) for n in answers)
        samples.append(Tokens((span(rng.integers(8, vocab, prompt), False),), branches, "random", row))
    return samples


def apart(pair: Tokens) -> Tokens:
    """The pair with its prompt before each answer: without a trunk, every branch is a beginning."""
    return Tokens((), tuple((*pair.trunk, *branch) for branch in pair.branches), pair.source, pair.row)


def ideal_sharing(pairs: Sequence[Tokens]) -> float:
    """(2 P + C + R) / (P + C + R), summed: how many times fewer tokens run where the prompt is shared."""
    return sum(len(apart(pair)) for pair in pairs) / sum(map(len, pairs))


# --- model ---


@dataclass(frozen=True)
class Method:
    """How a model is trained: `lora`, `qlora` or `full`, on a backend, with what the recipe calls checkpointing."""

    trains: str = "lora"
    backend: str = "auto"
    checkpointing: Recompute = False


def random_llama(
    shape: Shape, device: torch.device, dtype: torch.dtype, positions: int, trains: str
) -> LlamaForCausalLM:
    """A Llama with random weights, made on its device; frozen unless it is trained in full, 4-bit for `qlora`."""
    config = shape.config(positions)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if trains == "full" else dtype)
    try:
        with torch.device(device):
            lm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    if trains == "qlora":
        _quantize(lm, dtype, device)
    return lm.requires_grad_(trains == "full")


def _quantize(lm: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Puts NF4 linears of bitsandbytes in the place of the layers' linears, one after another."""
    import bitsandbytes as bnb

    for layer in lm.model.layers:  # type: ignore[union-attr, attr-defined]
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    quantized = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                    quantized.weight = bnb.nn.Params4bit(
                        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                    )
                    setattr(parent, name, quantized.to(device))


def adapted(lm: LlamaForCausalLM) -> Any:
    """The model with a LoRA adapter in fp32 on every linear."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(lm, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_policy(shape: Shape, method: Method, device: torch.device, dtype: torch.dtype, positions: int) -> Policy:
    """The policy that `tuner` would train: adapter, fused modules, kernels and attention of its backend."""
    lm = random_llama(shape, device, dtype, positions, method.trains)
    model = lm if method.trains == "full" else adapted(lm)
    backend, _ = kernels.resolve_backend(method.backend, device)
    attention, _ = kernels.resolve_attention("auto", device, dtype, backend)
    functions = kernels.load(backend, attention)
    fuse(model, functions, recompute=method.checkpointing)
    return Policy(model, compute_dtype=dtype, kernels=functions, attn_implementation=attention)


# --- what is minimised ---


@dataclass(frozen=True)
class LanguageStage:
    """Negative log-likelihood of the trained tokens."""

    terms: tuple[str, ...] = ("nll",)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        return {"nll": sum(weight_sum(sample) for sample in samples)}

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, _: Sequence[Tokens]) -> Mapping[str, Tensor]:
        return {"nll": -(policy(batch) * batch.weights).sum()}


@dataclass(frozen=True)
class PreferenceStage:
    """DPO (arXiv:2305.18290 eq. 7) over pairs; the reference is the pass without the adapter.

    `shared` runs each prompt once for both of its answers; without it each answer comes after a prompt of its own.
    """

    reference: Reference
    shared: bool = True
    terms: tuple[str, ...] = ("sigmoid",)

    def laid_out(self, samples: Sequence[Tokens]) -> list[Tokens]:
        """The samples of the loop: a pair stays one sample, for its two answers must not be divided."""
        return list(samples) if self.shared else list(map(apart, samples))

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        return {"sigmoid": float(len(samples))}

    def losses(
        self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> Mapping[str, Tensor]:
        ratios = batch.per_sequence(policy(batch) - self.reference(batch))  # [S], pair after pair, chosen first
        return {"sigmoid": preference_loss(ratios.view(len(samples), 2))}


def preference_loss(ratios: Tensor) -> Tensor:
    """`[pairs, 2]`, log-ratios of chosen and rejected answers -> the summed loss."""
    return -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum()


# --- our steps ---


def steps(
    policy: Policy,
    stage: Any,
    samples: Sequence[Tokens],
    *,
    batch_size: int,
    microbatch_tokens: int,
    count: int,
    warm_up: int,
    packing: bool = True,
    every_loss: bool = False,
) -> dict[str, Any]:
    """`count` optimizer steps of tuner's loop after `warm_up` that are not counted; rates, memory and losses."""
    device = policy.device
    trained = [p for p in policy.parameters() if p.requires_grad]
    plan = Plan(
        [len(s) for s in samples], batch_size=batch_size, microbatch_tokens=microbatch_tokens, packing=packing,
        max_steps=warm_up + count,
    )  # fmt: skip
    loop = Loop(
        policy=policy, module=policy, optimizer=torch.optim.AdamW(trained, lr=RATE, fused=True),
        schedule=lambda _: RATE, stage=stage, samples=samples, plan=plan, devices=Devices(device, 0, 1),
        lag=LAG[device.type], ahead=LAG[device.type] > 0,
    )  # fmt: skip
    before = held_bytes(device)
    reset_peak(device)
    losses, times = list[float](), [time.perf_counter()]

    def after(progress: Progress, report: StepReport) -> bool:
        losses.append(float(next(iter(report.losses.values()))))
        if progress.step in (warm_up, warm_up + count):
            synchronize(device)
            times.append(time.perf_counter())
        return True

    loop.run(Progress(), after, lambda step: step in (warm_up, warm_up + count))
    started, ended = times[-2:]
    counted = [i for step in range(warm_up, warm_up + count) for i in plan.samples(step)]
    return {
        "tokens_per_second": sum(len(samples[i]) for i in counted) / (ended - started),
        "samples_per_second": len(counted) / (ended - started),
        "step_seconds": (ended - started) / count,
        "warm_up_seconds": started - times[0],
        "first_losses": losses[:3],
        **({"losses": losses} if every_loss else {}),
        "backend": policy.kernels.backend,
        **memory(device, before),
    }


# --- the same by plain transformers and peft ---


def plain_preference(
    shape: Shape,
    samples: Sequence[Tokens],
    device: torch.device,
    dtype: torch.dtype,
    together: int,
    count: int,
    warm_up: int,
) -> dict[str, Any]:
    """DPO as one writes it with transformers and peft: both answers with a prompt of their own, padded; `together`
    pairs at once; log-probs from the logits of the answers; the reference by switching the adapter off."""
    model = adapted(random_llama(shape, device, dtype, max(map(len, samples)), "lora"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    before = held_bytes(device)
    reset_peak(device)
    times, losses = [], []
    for step in range(warm_up + count):
        chosen = [samples[(step * together + i) % len(samples)] for i in range(together)]
        synchronize(device)
        started = time.perf_counter()
        ids, labels = _padded(chosen, device)
        with torch.no_grad(), model.disable_adapter():
            reference = _answer_logps(model, ids, labels)
        loss = preference_loss((_answer_logps(model, ids, labels) - reference).view(-1, 2)) / together
        loss.backward()
        clip(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        synchronize(device)
        times.append(time.perf_counter() - started)
    return {
        "pairs_per_second": together * count / sum(times[warm_up:]),
        "step_seconds": statistics.median(times[warm_up:]),
        "warm_up_seconds": sum(times[:warm_up]),
        "first_losses": losses[:3],
        **memory(device, before),
    }


def _padded(samples: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [2 pairs, T], targets [2 pairs, T] with -100 where nothing is scored)."""
    rows = [(s.trunk[0].ids, branch[0].ids) for s in samples for branch in s.branches]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.full((len(rows), longest), 5), torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        both = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        ids[row, : len(both)] = both
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    return ids.to(device), labels.to(device)


def _answer_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Summed log-prob of each answer, `[rows]`; padding comes last, so a causal model needs no mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    picked = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets >= 0)).sum(-1)


# --- memory ---


def activation_bytes(policy: Policy, stage: Any, samples: Sequence[Tokens]) -> float:
    """Bytes that a forward keeps for its backward, for each token of one microbatch of `samples`.

    On a GPU what the allocator holds more after the forward than before it; on a CPU the tensors that autograd saves,
    each storage once, weights left out.
    """
    device, batch = policy.device, pack(samples, ROW_MULTIPLE[policy.device.type]).to(policy.device)
    policy.train()
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = held_bytes(device)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        loss = next(iter(stage.losses(policy, batch, samples).values()))
    after = held_bytes(device)
    loss.backward()
    policy.zero_grad(set_to_none=True)
    return (after - before if device.type == "cuda" else sum(kept.values())) / batch.num_tokens


def most_that_fits(fits: Callable[[int], bool], low: int, high: int, deadline: float) -> int:
    """The largest number up to `high` that fits, to a sixteenth, found by doubling and halving; 0 if `low` is too much.

    After `deadline` (of `time.monotonic`) nothing more is tried, and the largest that was seen to fit stands.
    """
    best, over = 0, high + 1
    while over - best > max(1, best // 16) and time.monotonic() < deadline:
        doubled = min(high, max(low, best * 2)) if over > high else (best + over) // 2
        best, over = (doubled, over) if fits(doubled) else (best, doubled)
        if best == high:
            break
    return best


def free(device: torch.device) -> None:
    """Gives back what an attempt that failed has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """What the device allocator holds; on a CPU the most that the process has held."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else common.peak_memory_bytes()


def memory(device: torch.device, before: int) -> dict[str, Any]:
    """Peak of the allocator, on a CPU of the process; and what was held before the first step."""
    cuda = device.type == "cuda"
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else common.peak_memory_bytes(),
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "held_before_bytes": before,
    }
