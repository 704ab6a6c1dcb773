"""Every op of every backend against plain torch in float64: values, all gradients, errors, layouts, and what is left.

A new op is a row of `OPS`, and a new backend a name in `kernels.BACKENDS`. The Triton kernels run compiled where there
is a GPU, and else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tuner import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
Function = Callable[..., Any]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- what plain torch computes: the eager code of transformers, save that float64 stays float64 ---


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = wide(x)
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return plain_rms_norm(total, weight, eps), total


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    return F.log_softmax(wide(logits), dim=-1).gather(1, targets[:, None])[:, 0]


# --- inputs of a size ---


def make_rms_norm(g: Generator, rows: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(1, rows, width, generator=g), torch.randn(width, generator=g)


def make_add_rms_norm(g: Generator, rows: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(1, rows, width, generator=g), *make_rms_norm(g, rows, width)


def make_rope(g: Generator, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """Two packed documents, so that positions start anew, far into a context that Llama 3's table stretches."""
    scaling = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    table = LlamaRotaryEmbedding(LlamaConfig(head_dim=dim, max_position_embeddings=512, rope_parameters=scaling))
    first = tokens // 2
    positions = torch.cat([torch.arange(first) * 31, torch.arange(tokens - first) * 17])[None]
    q, k = (torch.randn(1, tokens, n, dim, generator=g) for n in (heads, kv_heads))
    return q, k, *table(q, positions)


def make_swiglu(g: Generator, *shape: int) -> tuple[Tensor, ...]:
    return torch.randn(shape, generator=g) * 3, torch.randn(shape, generator=g)


def make_token_logps(g: Generator, count: int, width: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Every third target is the first one's."""
    targets = torch.randint(0, vocabulary, (count,), generator=g)
    targets[::3] = targets[:1].clone()
    return torch.randn(count, width, generator=g), torch.randn(vocabulary, width, generator=g), targets


# --- the table ---


@dataclass(frozen=True)
class Op:
    """A function of `Kernels`, and how it is tested."""

    name: str
    plain: Function
    make: Callable[..., tuple[Tensor, ...]]
    trained: int  # how many of the inputs, from the first on, get a gradient
    size: tuple[int, ...]  # numbers enough that an error is no accident
    odd: tuple[tuple[int, ...], ...]  # the shapes that go wrong: one number, few numbers, a ragged one, others
    mutant: Callable[[Function], Function]  # from the reference, a function with a fault
    options: tuple[Any, ...] = ()  # what follows the tensors
    masters: frozenset[int] = frozenset()  # inputs that stay in fp32
    cut: Mapping[str, object] = field(default_factory=dict)  # constants of the Triton module, to cut up what is small

    def load(self, backend: str) -> Function:
        return getattr(import_module(f"tuner.kernels.{kernels.OPS[self.name]}.{backend}"), self.name)

    def inputs(self, size: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        made = self.make(torch.Generator().manual_seed(seed), *size)
        return [
            (x.to(dtype) if x.is_floating_point() and i not in self.masters else x).to(DEVICE)
            for i, x in enumerate(made)
        ]


def rounds_statistics(_: Function) -> Function:
    return lambda x, weight, eps: weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def forgets_a_gradient(reference: Function) -> Function:
    def mutant(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, total = reference(*arguments)
        return y, total.detach() + 0 * arguments[0]

    return mutant


def does_not_turn_back(reference: Function) -> Function:
    def mutant(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + (y - x).detach() for x, y in zip((q, k), reference(q, k, cos, sin), strict=True))

    return mutant


def holds_the_sigmoid_fast(_: Function) -> Function:
    return lambda gate, up: gate * torch.sigmoid(gate).detach() * up


def rounds_its_result(reference: Function) -> Function:
    return lambda *arguments: reference(*arguments).bfloat16().float()


NORMS: dict[str, Any] = {
    "size": (8, 1000),
    "odd": ((1, 1), (2, 5), (5, 65), (3, 130), (7, 200), (1, 64), (0, 12)),
    "options": (EPS,),
    "cut": {"LONGEST": 64, "PROGRAMS": 2},
}
RMS_NORM: dict[str, Any] = {"plain": plain_rms_norm, "make": make_rms_norm, "mutant": rounds_statistics, **NORMS}
LOGPS: dict[str, Any] = {
    "plain": plain_token_logps,
    "make": make_token_logps,
    "size": (24, 48, 1001),
    "odd": ((1, 3, 1), (2, 3, 5), (5, 16, 61), (7, 8, 128), (3, 9, 131), (0, 4, 10)),
    "mutant": rounds_its_result,
    "cut": {"LONGEST": 64, "chunk_rows": lambda weight: 3},
}
OPS = {
    "rms_norm": Op("rms_norm", trained=2, **RMS_NORM),
    "rms_norm, frozen": Op("rms_norm", trained=1, **RMS_NORM),
    "rms_norm, fp32 weight": Op("rms_norm", trained=2, masters=frozenset({1}), **RMS_NORM),
    "add_rms_norm": Op(
        "add_rms_norm", plain_add_rms_norm, make_add_rms_norm, trained=3, mutant=forgets_a_gradient, **NORMS
    ),
    "rope": Op(
        "rope", plain_rope, make_rope, trained=2, size=(12, 4, 2, 64), mutant=does_not_turn_back,
        odd=((1, 1, 1, 2), (2, 3, 1, 6), (3, 3, 1, 48), (2, 5, 5, 6), (0, 2, 1, 8)),
    ),
    "swiglu": Op(
        "swiglu", plain_swiglu, make_swiglu, trained=2, size=(1, 7, 1001), mutant=holds_the_sigmoid_fast,
        odd=((1, 1, 1), (1, 3, 5), (2, 5, 13), (1, 3, 64), (1, 0, 8)), cut={"BLOCK": 64},
    ),
    "token_logps": Op("token_logps", trained=1, **LOGPS),
    "token_logps, trained head": Op("token_logps", trained=2, masters=frozenset({1}), **LOGPS),
}  # fmt: skip
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_backend = pytest.mark.parametrize("backend", kernels.BACKENDS)


# --- how a function is run ---


def dense(x: Tensor) -> Tensor:
    return x


def spread(x: Tensor) -> Tensor:
    """The same numbers in every other place, beside NaN."""
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0] if x.is_floating_point() else x


def pitched(x: Tensor) -> Tensor:
    """The same rows, with NaN between them."""
    return F.pad(x, (0, 3), value=float("nan"))[..., :-3] if x.dim() > 1 else x


def swapped(x: Tensor) -> Tensor:
    """The same numbers with the middle dimensions the other way round in memory, as attention leaves them."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x


def results(
    op: Op, function: Function, inputs: Sequence[Tensor], layout: Function = dense, gradient: str = "random"
) -> list[Tensor]:
    """The outputs, then the gradients of the trained inputs, under gradients that are the same for every function."""
    leaves = [x.detach().clone().requires_grad_(i < op.trained) for i, x in enumerate(inputs)]
    outputs = function(*map(layout, leaves), *op.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=g).bfloat16().to(y.device, y.dtype) for y in outputs]
    if gradient == "constant":  # one number in memory, as that of a sum is
        grads = [torch.full((), 0.5, dtype=y.dtype, device=y.device).expand(y.shape) for y in outputs]
    torch.autograd.backward(outputs, list(map(layout, grads)) if gradient == "random" else grads)
    assert [leaf.grad is not None for leaf in leaves] == [i < op.trained for i in range(len(leaves))]
    return [y.detach() for y in outputs] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def exactly(op: Op, inputs: Sequence[Tensor], gradient: str = "random") -> list[Tensor]:
    """What plain torch gives in float64."""
    return results(op, op.plain, [x.double() if x.is_floating_point() else x for x in inputs], gradient=gradient)


def close(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=2e-5)


@pytest.fixture
def cut(op: Op, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs are worked on in several parts."""
    if backend == "triton":
        for name, value in op.cut.items():
            monkeypatch.setattr(f"tuner.kernels.{kernels.OPS[op.name]}.triton.{name}", value)


# --- invariant 11 ---


def check_errors(op: Op, function: Function, dtype: torch.dtype) -> None:
    """The error of each output and gradient is at most 1.5 times that of plain torch in the same dtype."""
    inputs = op.inputs(op.size, dtype)
    mine, torchs, exact = results(op, function, inputs), results(op, op.plain, inputs), exactly(op, inputs)
    for i, (a, b, right) in enumerate(zip(mine, torchs, exact, strict=True)):
        assert a.dtype == b.dtype
        error, allowed = (a.double() - right).norm(), 1.5 * (b.double() - right).norm()
        assert error <= allowed, f"result {i}: {error:.3e} > {allowed:.3e}"


@every_op
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_error_is_no_worse_than_that_of_plain_torch(op: Op, backend: str, dtype: torch.dtype) -> None:
    check_errors(op, op.load(backend), dtype)


@every_op
def test_mutants_are_caught(op: Op) -> None:
    with pytest.raises(AssertionError, match="result"):
        check_errors(op, op.mutant(op.load("reference")), torch.bfloat16)


@every_op
def test_references_pass_gradcheck(op: Op) -> None:
    """In float64, against finite differences."""
    inputs = [x.double() if x.is_floating_point() else x for x in op.inputs(op.odd[1], torch.float32)]
    for i, x in enumerate(inputs):
        x.requires_grad_(i < op.trained)
    assert torch.autograd.gradcheck(lambda *tensors: op.load("reference")(*tensors, *op.options), inputs)


# --- sizes, layouts, memory ---


@every_op
@every_backend
@pytest.mark.usefixtures("cut")
def test_odd_sizes(op: Op, backend: str) -> None:
    for size in op.odd:
        inputs = op.inputs(size, torch.float32)
        close(results(op, op.load(backend), inputs), exactly(op, inputs))


@every_op
@every_backend
def test_what_is_not_contiguous_is_read_right(op: Op, backend: str) -> None:
    inputs = op.inputs(op.odd[2], torch.float32)
    for layout in (spread, pitched, swapped):
        close(results(op, op.load(backend), inputs, layout), exactly(op, inputs))
    close(results(op, op.load(backend), inputs, gradient="constant"), exactly(op, inputs, gradient="constant"))


def check_memory(op: Op, backend: str) -> None:
    """New memory that is full of NaN does not show: every number is written, and none read before."""
    inputs = op.inputs(op.odd[2], torch.bfloat16)
    clean = results(op, op.load(backend), inputs)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        found = results(op, op.load(backend), inputs)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*arguments: Any, **options: Any) -> Tensor:
        made = allocate(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return allocate_nan


@every_op
@every_backend
@pytest.mark.usefixtures("cut")
def test_poisoned_memory_does_not_show_and_a_second_run_gives_the_same_bytes(op: Op, backend: str) -> None:
    check_memory(op, backend)


def test_mutant_a_launch_that_leaves_out_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("tuner.kernels.swiglu.triton")
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module.triton, "cdiv", lambda size, block: size // block)
    with pytest.raises(AssertionError):
        check_memory(OPS["swiglu"], "triton")


# --- what is particular to an op ---


@every_backend
def test_a_frozen_norm_makes_no_gradient_of_its_weight(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in secret: sums over rows would be tensors of the width of the weight."""
    made: list[tuple[int, ...]] = []

    def noted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_note(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            made.append(tuple(tensor.shape))
            return tensor

        return allocate_and_note

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    seen = []
    for op in (OPS["rms_norm"], OPS["rms_norm, frozen"]):
        made.clear()
        results(op, op.load(backend), op.inputs((6, 40), torch.float32))
        seen.append((6, 40) in made)
    assert seen == [backend == "triton", False]


@every_backend
def test_tables_may_be_wider_than_what_turns(backend: str) -> None:
    """fp32 angles, as a model in bf16 may give them."""
    op = OPS["rope"]
    inputs = op.inputs(op.odd[2], torch.bfloat16)[:2] + op.inputs(op.odd[2], torch.float32)[2:]
    found, exact = results(op, op.load(backend), inputs), exactly(op, inputs)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, rtol=2**-7, atol=2**-8)
