"""LoRA linears of every backend against plain matmuls in float64: values, gradients, ranks, sizes, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.compiling import Request, compiled, has_compiler
from tuner.kernels.lora_linear import Adapter, node, reference
from tuner.kernels.lora_linear import triton as fused

backends = pytest.mark.parametrize("backend", [reference, fused], ids=["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dataclass
class Matrix:
    """A frozen linear, as a model's are read; the weight is lost once another is asked for."""

    w: Tensor
    b: Tensor | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.w.to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.b is None else self.b.to(dtype)


@dataclass
class Case:
    x: Tensor  # [1, N, in], or gate and up [2, N, in]
    bases: list[Matrix]
    adapters: list[Adapter]
    grads: list[Tensor]

    @property
    def masters(self) -> list[Tensor]:
        return node.masters(self.adapters)


def case(rows: int, width: int, outs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, gated: bool) -> Case:
    g = torch.Generator().manual_seed(rows + width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    bases, adapters = [], []
    for i, (out, r) in enumerate(zip(outs, ranks, strict=True)):
        bias = randn(out).to(dtype) if i % 2 else None
        bases.append(Matrix((randn(out, width) / width**0.5).to(dtype), bias))
        a, b = (m.requires_grad_() for m in (randn(r, width) / width**0.5, randn(out, r)))
        adapters.append(Adapter(a, b, 0.5 + i))
    x = randn(2 if gated else 1, rows, width).to(dtype)
    return Case(x, bases, adapters, [randn(rows, out).to(dtype) for out in outs])


def run(backend: ModuleType, case: Case, gated: bool = False, **options: Any) -> list[Tensor]:
    """The outputs, and the gradients of the input and of every master."""
    x = case.x.clone().requires_grad_()
    if gated:
        outputs = (backend.swiglu_lora_linear(*x, case.bases[0], case.adapters[0], **options),)
    else:
        outputs = tuple(y[0] for y in backend.lora_linears(x, case.bases, case.adapters))
    found = torch.autograd.grad(outputs, [x, *case.masters], case.grads)
    return [t.detach() for t in (*outputs, *found)]


def plain(case: Case, dtype: torch.dtype, gated: bool) -> list[Tensor]:
    """The same as peft computes it, everything in `dtype`."""
    x = case.x.to(dtype).requires_grad_()
    masters = [m.detach().to(dtype).requires_grad_() for m in case.masters]
    h = F.silu(x[0]) * x[1] if gated else x[0]
    outputs = [
        F.linear(h, base.weight(dtype), base.bias(dtype)) + F.linear(F.linear(h, a), b) * adapter.scaling
        for base, adapter, a, b in zip(case.bases, case.adapters, masters[::2], masters[1::2], strict=True)
    ]
    found = torch.autograd.grad(outputs, [x, *masters], [g.to(dtype) for g in case.grads])
    return [t.detach() for t in (*outputs, *found)]


def assert_exact(found: Sequence[Tensor], case: Case, dtype: torch.dtype, gated: bool) -> None:
    """Errors against float64 are at most 1.5 times those of plain torch in the same dtype."""
    exact, stock = plain(case, torch.float64, gated), plain(case, dtype, gated)
    floor = 1e-6 if dtype == torch.float32 else 2**-9  # plain torch may be luckily exact, as where one number is summed
    for mine, theirs, wanted in zip(found, stock, exact, strict=True):
        error, allowed = (mine.double() - wanted).norm(), (theirs.double() - wanted).norm()
        assert error <= 1.5 * max(allowed, floor * wanted.norm()), (error / wanted.norm(), allowed / wanted.norm())


SHAPES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "one row": (1, 40, (24,), (1,)),
    "mixed ranks, odd widths": (65, 50, (33, 70, 7), (1, 5, 64)),
    "several tiles": (130, 72, (600, 40), (16, 3)),
    "no rows beside a tile": (128, 64, (64, 64, 64), (8, 8, 8)),
    "wider than a tile of ranks": (9, 20, (30,), (130,)),
    "more than one launch lays out": (7, 20, (9, 12, 5, 8), (2, 3, 1, 4)),
}


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linears_on_one_input(backend: ModuleType, dtype: torch.dtype, shape: Any) -> None:
    inputs = case(*shape, dtype=dtype, gated=False)
    found = run(backend, inputs)
    assert_exact(found, inputs, dtype, gated=False)
    assert {t.dtype for t in found[-len(inputs.masters) :]} == {torch.float32}


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 40, (24,), (1,)), (67, 600, (36,), (16,)), (64, 70, (30,), (130,))])
def test_the_linear_behind_a_gate(backend: ModuleType, dtype: torch.dtype, shape: Any) -> None:
    inputs = case(*shape, dtype=dtype, gated=True)
    assert_exact(run(backend, inputs, gated=True), inputs, dtype, gated=True)


@backends
def test_rows_that_lie_apart(backend: ModuleType) -> None:
    """Inputs and gradients that a caller hands in transposed or cut out of something wider."""
    inputs = case(33, 40, (24, 30), (4, 4), torch.float32, gated=False)
    wanted = run(backend, inputs)
    inputs.x = inputs.x.mT.contiguous().mT
    inputs.grads = [inputs.grads[0].T.contiguous().T, F.pad(inputs.grads[1], (3, 3))[:, 3:-3]]
    for mine, same in zip(run(backend, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-5)


@backends
@dtypes
@pytest.mark.parametrize("gated", [False, True])
def test_the_same_bytes_every_time_whatever_memory_held(
    backend: ModuleType, dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = case(70, 40, (24,) if gated else (24, 600), (4,) if gated else (4, 16), dtype, gated)
    clean = run(backend, inputs, gated)
    empties = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    for home, name in empties:
        original = getattr(home, name)

        def poisoned(*args: Any, original: Callable[..., Tensor] = original, **options: Any) -> Tensor:
            made = original(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(home, name, poisoned)
    assert torch.empty(3).isnan().all()
    for mine, before in zip(run(backend, inputs, gated), clean, strict=True):
        assert torch.equal(mine, before)


@backends
def test_an_unwanted_output_has_its_gradients(backend: ModuleType) -> None:
    inputs = case(20, 40, (24,), (4,), torch.float32, gated=True)
    for mine, same in zip(run(backend, inputs, True, wanted=False)[1:], run(backend, inputs, True)[1:], strict=True):
        assert torch.equal(mine, same)


@backends
def test_an_input_without_gradient_and_a_frozen_adapter(backend: ModuleType) -> None:
    inputs = case(20, 40, (24, 16), (4, 2), torch.float32, gated=False)
    wanted = run(backend, inputs)
    outputs = backend.lora_linears(inputs.x, inputs.bases, inputs.adapters)
    found = torch.autograd.grad(outputs, inputs.masters, [g[None] for g in inputs.grads])
    assert all(torch.equal(mine, same) for mine, same in zip(found, wanted[3:], strict=True))
    with torch.no_grad():
        for y, same in zip(backend.lora_linears(inputs.x, inputs.bases, inputs.adapters), wanted[:2], strict=True):
            assert torch.equal(y[0], same) and not y.requires_grad


# --- float64 and dropout ---


def slopes(gated: bool, dropout: float) -> bool:
    """Whether the reference's gradients are the slopes of its values, in float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    outs = (4,) if gated else (4, 6)
    bases = [Matrix(torch.randn(out, 5, generator=g, dtype=torch.float64), None) for out in outs]
    masters = [
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        for i, out in enumerate(outs)
        for shape in ((i + 1, 5), (out, i + 1))
    ]

    def function(x: Tensor, *masters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same numbers are dropped at every call
        pairs = zip(masters[::2], masters[1::2], strict=True)
        adapters = [Adapter(a, b, 0.7 + i, dropout) for i, (a, b) in enumerate(pairs)]
        if gated:
            return (reference.swiglu_lora_linear(*x, bases[0], adapters[0]),)
        return reference.lora_linears(x, bases, adapters)

    assert all(y.dtype == torch.float64 for y in function(x, *masters))
    return torch.autograd.gradcheck(function, (x, *masters), raise_exception=False)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_reference_are_slopes(gated: bool, dropout: float) -> None:
    assert slopes(gated, dropout)


@backends
def test_dropout_drops_of_the_adapters_input_alone(backend: ModuleType) -> None:
    inputs = case(20, 40, (24, 16), (4, 2), torch.float32, gated=False)
    base = [F.linear(inputs.x[0], m.w, m.b) for m in inputs.bases]
    inputs.adapters = [Adapter(a.a, a.b, a.scaling, 0.3) for a in inputs.adapters]
    torch.manual_seed(4)
    found = run(backend, inputs)
    torch.manual_seed(4)
    for y, plain, adapter in zip(found, base, inputs.adapters, strict=False):
        delta = F.dropout(inputs.x[0], 0.3) @ adapter.a.T @ adapter.b.T * adapter.scaling
        torch.testing.assert_close(y, plain + delta.detach(), rtol=1e-5, atol=1e-5)
    after = torch.rand(1)
    torch.manual_seed(4)
    backend.lora_linears(inputs.x, inputs.bases, inputs.adapters)
    assert torch.equal(after, torch.rand(1)), "the backward leaves the random numbers as they were"


# --- mutants ---


def test_mutant_another_dropout_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def elsewhere(state: Tensor, device: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(node, "_drawn_again", elsewhere)
    assert not slopes(False, 0.4) and not slopes(True, 0.4)


@pytest.mark.parametrize("mutant", ["a part is left out", "the scaling is left out", "the gate is left out"])
def test_mutants_of_the_kernels(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = mutant == "the gate is left out"
    inputs = case(130, 40, (24,), (4,), torch.float32, gated)
    assert_exact(run(fused, inputs, gated), inputs, torch.float32, gated)
    total, lay_out = fused._sum, fused._lay_out
    if mutant == "a part is left out":
        monkeypatch.setattr(fused, "_sum", lambda parts, out: total(parts[: max(1, len(parts) - 1)], out))
    else:
        change: dict[str, Any] = {"outer_gated": lambda u, gate, up: fused._outer(u, gate)}
        if mutant == "the scaling is left out":
            change = {"lay_out": lambda masters, scalings, dtype: lay_out(masters, [1.0] * len(scalings), dtype)}
        monkeypatch.setattr(fused, "PARTS", node.Parts(**(vars(fused.PARTS) | change)))
    with pytest.raises(AssertionError):
        assert_exact(run(fused, inputs, gated), inputs, torch.float32, gated)


# --- compiled ---

MODULE = fused.__name__


def tiles(dtype: str, rank: int, gated: bool) -> Request:
    """A tile's kernel over a large matrix in the form that `_tiles` launches."""
    size = 4 if dtype == "fp32" else 2
    padded, columns = fused.tile(rank, size, gated)
    numbers = ("rows", "columns", "rows_each", "x_stride", "skinny_stride", "b_stride")
    signature = {f"{name}_ptr": f"*{dtype}:16" for name in ("x", "up", "skinny", "b")}
    signature |= {f"{name}_ptr": "*fp32:16" for name in ("outer", "through")} | dict.fromkeys(numbers, "i32:16")
    strides = ("outer_stride", "outer_rank_stride")
    signature |= dict(zip(strides, ("1", "i32:16") if gated else ("i32:16", "1"), strict=True))
    constexprs = {
        "RANK": rank, "PADDED": padded, "GATED": gated, "THROUGH": not gated, "ROWS": fused.ROWS, "COLUMNS": columns,
    }  # fmt: skip
    return Request(
        f"{MODULE}:_tiles_kernel", signature, constexprs, num_warps=fused.NUM_WARPS, num_stages=fused.NUM_STAGES
    )


@has_compiler
def test_the_kernels_compile_for_a_gpu_and_fit_its_registers() -> None:
    ranks = (("bf16", 16), ("bf16", 128), ("fp32", 16))
    forms = [(dtype, rank, gated) for dtype, rank in ranks for gated in (False, True)]
    laid = {f"p{i}": "*fp32:16" for i in range(6)} | {f"n{i}": "i32" for i in range(6)}
    laid |= {f"s{i}": "fp32" for i in range(6)} | {"out_ptr": "*bf16:16"}
    summed = {"parts_ptr": "*fp32:16", "out_ptr": "*bf16:16", "parts": "i32", "size": "i32:16", "out_stride": "i32:16"}
    reports = compiled(
        [tiles(*form) for form in forms]
        + [Request(f"{MODULE}:_lay_out_kernel", laid, {"BLOCK": fused.BLOCK})]
        + [Request(f"{MODULE}:_sum_kernel", summed, {"WIDTH": 16, "BLOCK": fused.BLOCK})]
    )
    for report in reports:
        assert report.shared <= 227 * 1024
    for (dtype, _, _), report in zip(forms, reports, strict=False):
        assert report.wgmma == (dtype == "bf16")
        assert report.stack <= (0 if dtype == "bf16" else 8)
    assert all(report.stack == 0 for report in reports[len(forms) :])
