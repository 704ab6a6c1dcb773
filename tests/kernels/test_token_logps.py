"""Every backend of token_logps against plain log_softmax in float64: values, gradients, chunks, and bf16 error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner import kernels
from tuner.kernels.token_logps import reference

M, H, V = 23, 16, 61
Op = Callable[[Tensor, Tensor, Tensor], Tensor]
backends = pytest.mark.parametrize("op", [kernels.load("reference").token_logps], ids=["reference"])


def inputs(seed: int = 0, scale: float = 1.0, rows: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets (some of them repeated) and the gradient that comes back."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, H, generator=g) * scale, torch.randn(V, H, generator=g)
    return hidden, weight, torch.randint(0, V, (rows,), generator=g), torch.randn(rows, generator=g)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide, dim=-1).gather(1, targets[:, None])[:, 0]


def results(op: Op, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, *, train_head: bool) -> list[Tensor]:
    """[logps, d hidden] and, with a trainable head, d weight."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(train_head)
    logps = op(hidden, weight, targets)
    logps.backward(grad.to(logps.dtype))
    assert hidden.grad is not None and (weight.grad is not None) == train_head
    return [t.detach() for t in (logps, hidden.grad, weight.grad) if t is not None]


@backends
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["plain", "confident"])
def test_values_and_gradients_equal_log_softmax_in_float64(op: Op, train_head: bool, scale: float) -> None:
    hidden, weight, targets, grad = inputs(scale=scale)
    found = results(op, hidden, weight, targets, grad, train_head=train_head)
    wanted = results(plain, hidden.double(), weight.double(), targets, grad.double(), train_head=train_head)
    assert found[0].dtype == torch.float32
    for mine, exact in zip(found, wanted, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - exact).abs().max() <= 2e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [1, 7, 22, M, 100])
def test_the_chunk_size_does_not_show(train_head: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = results(reference.token_logps, *inputs(), train_head=train_head)
    monkeypatch.setattr(reference, "chunk_rows", lambda weight: rows)
    for mine, same in zip(results(reference.token_logps, *inputs(), train_head=train_head), whole, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-6, atol=2e-6)


def test_chunks_follow_the_vocabulary() -> None:
    assert reference.chunk_rows(torch.empty(128_256, 1, device="cpu")) == 64  # at least a multiple
    assert reference.chunk_rows(torch.empty(512, 1, device="cpu")) == 8192


@backends
def test_the_gradient_is_the_slope(op: Op) -> None:
    """A central difference along random directions, which shares nothing with autograd."""
    hidden, weight, targets, grad = inputs()
    _, grad_hidden, grad_weight = results(op, hidden, weight, targets, grad, train_head=True)
    g = torch.Generator().manual_seed(1)
    dh, dw = torch.randn(M, H, generator=g).double(), torch.randn(V, H, generator=g).double()

    def loss(t: float) -> float:
        return float(plain(hidden.double() + t * dh, weight.double() + t * dw, targets) @ grad.double())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx(float((grad_hidden * dh).sum() + (grad_weight * dw).sum()), rel=1e-5)


@backends
def test_no_prediction_and_no_gradient(op: Op) -> None:
    hidden, weight, targets, _ = inputs(rows=0)
    logps, grad_hidden, grad_weight = results(op, hidden, weight, targets, torch.zeros(0), train_head=True)
    assert (logps.shape, grad_hidden.shape, int(grad_weight.count_nonzero())) == ((0,), (0, H), 0)
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        logps = op(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, plain(hidden.double(), weight.double(), targets).float())


def check_bf16_error(op: Op, *, train_head: bool) -> None:
    """Invariant 11: the error against float64 is at most 1.5 times that of plain torch in the same dtype."""
    for seed in range(3):
        hidden, weight, targets, grad = inputs(seed, rows=200)
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
        exact = results(plain, hidden.double(), weight.double(), targets, grad.double(), train_head=train_head)
        # a trainable head is stored in fp32 and cast
        head = weight.float() if train_head else weight
        mine = results(op, hidden, head, targets, grad, train_head=train_head)
        torchs = results(plain, hidden, head, targets, grad, train_head=train_head)
        for name, a, b, x in zip(("logps", "hidden", "weight"), mine, torchs, exact, strict=False):
            error, allowed = (a.double() - x).norm(), 1.5 * (b.double() - x).norm()
            assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


@backends
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
def test_the_bf16_error_is_no_worse_than_that_of_plain_torch(op: Op, train_head: bool) -> None:
    check_bf16_error(op, train_head=train_head)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
def test_mutant_a_kernel_that_rounds_its_result(train_head: bool) -> None:
    def rounded(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return reference.token_logps(hidden, weight, targets).bfloat16().float()

    with pytest.raises(AssertionError, match="logps"):
        check_bf16_error(rounded, train_head=train_head)


@backends
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["plain", "confident"])
def test_collisions_equal_float64_and_change_nothing_else(
    op: Callable[..., Tensor], train_head: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log Σ p², of whatever chunks; log-probs and gradients are those of a call that does not ask, to the bit."""
    monkeypatch.setattr(reference, "chunk_rows", lambda weight: 7)
    hidden, weight, targets, grad = inputs(scale=scale)
    exact = F.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    seen: list[Tensor] = []

    def both(*arguments: Tensor) -> Tensor:
        logps, collisions = op(*arguments, collision=True)
        seen.append(collisions.detach())
        return logps

    found = results(both, hidden, weight, targets, grad, train_head=train_head)
    error = (seen[0].double() - (2 * exact).logsumexp(-1)).abs().max()
    assert error <= 2e-6 * max(1.0, float(exact.abs().max()))
    for mine, same in zip(found, results(op, hidden, weight, targets, grad, train_head=train_head), strict=True):
        assert torch.equal(mine, same)


def test_collisions_have_no_gradient_and_cost_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_()
    reference.token_logps(hidden, weight, targets, collision=True)[1].sum().backward()
    assert hidden.grad is None or not hidden.grad.any()
    monkeypatch.setattr(reference, "_log_collision", lambda _: pytest.fail("nobody asked"))
    reference.token_logps(hidden, weight, targets)
    assert reference.token_logps(hidden[:0], weight, targets[:0], collision=True).shape == (2, 0)
