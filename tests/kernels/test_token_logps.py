"""What is particular to token_logps, of every backend: confident predictions, chunks, the slope, the measures."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.kernels.token_logps import head, reference, triton

M, H, V = 23, 16, 61
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = {"reference": reference, "triton": triton}
Op = Callable[..., Tensor]

every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
every_head = pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
every_scale = pytest.mark.parametrize("scale", [1.0, 100.0], ids=["plain", "confident"])


def inputs(seed: int = 0, scale: float = 1.0, rows: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets (some of them repeated) and the gradient that comes back."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, H, generator=g) * scale, torch.randn(V, H, generator=g)
    targets, grad = torch.randint(0, V, (rows,), generator=g), torch.randn(rows, generator=g)
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE), grad.to(DEVICE)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None])[:, 0]


def results(op: Op, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, *, train_head: bool) -> list[Tensor]:
    """[logps, d hidden] and, with a trainable head, d weight."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(train_head)
    logps = op(hidden, weight, targets)
    logps.backward(grad.to(logps.dtype))
    assert hidden.grad is not None and (weight.grad is not None) == train_head
    return [t.detach() for t in (logps, hidden.grad, weight.grad) if t is not None]


@every_module
@every_head
@every_scale
def test_values_and_gradients_equal_log_softmax_in_float64(module: ModuleType, train_head: bool, scale: float) -> None:
    hidden, weight, targets, grad = inputs(scale=scale)
    found = results(module.token_logps, hidden, weight, targets, grad, train_head=train_head)
    wanted = results(plain, hidden.double(), weight.double(), targets, grad.double(), train_head=train_head)
    assert found[0].dtype == torch.float32
    for mine, exact in zip(found, wanted, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - exact).abs().max() <= 2e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize(("name", "rows"), [*(("reference", n) for n in (1, 7, 22, M, 100)), ("triton", 7)])
@every_head
def test_the_chunk_size_does_not_show(name: str, rows: int, train_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = MODULES[name]
    whole = results(module.token_logps, *inputs(), train_head=train_head)
    monkeypatch.setattr(module, "chunk_rows", lambda weight: rows)
    for mine, same in zip(results(module.token_logps, *inputs(), train_head=train_head), whole, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-6, atol=2e-6)


def test_chunks_follow_the_vocabulary() -> None:
    assert reference.chunk_rows(torch.empty(128_256, 1, device="cpu")) == 256  # no fewer
    assert reference.chunk_rows(torch.empty(512, 1, device="cpu")) == 16384
    assert triton.chunk_rows(torch.empty(128_256, 1, dtype=torch.bfloat16)) == 4096
    assert triton.chunk_rows(torch.empty(128_256, 1)) == 2048


@every_module
def test_the_gradient_is_the_slope(module: ModuleType) -> None:
    """A central difference along random directions, which shares nothing with autograd."""
    hidden, weight, targets, grad = inputs()
    _, grad_hidden, grad_weight = results(module.token_logps, hidden, weight, targets, grad, train_head=True)
    g = torch.Generator().manual_seed(1)
    dh = torch.randn(M, H, generator=g).double().to(DEVICE)
    dw = torch.randn(V, H, generator=g).double().to(DEVICE)

    def loss(t: float) -> float:
        return float(plain(hidden.double() + t * dh, weight.double() + t * dw, targets) @ grad.double())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx(float((grad_hidden * dh).sum() + (grad_weight * dw).sum()), rel=1e-5)


@every_module
def test_no_prediction_and_no_gradient(module: ModuleType) -> None:
    op = module.token_logps
    hidden, weight, targets, grad = inputs(rows=0)
    logps, grad_hidden, grad_weight = results(op, hidden, weight, targets, grad, train_head=True)
    assert (logps.shape, grad_hidden.shape, int(grad_weight.count_nonzero())) == ((0,), (0, H), 0)
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        logps = op(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, plain(hidden.double(), weight.double(), targets).float())


def test_the_gradient_of_a_head_adds_up_in_fp32() -> None:
    """Also where the factors are narrow and the device adds the product itself."""
    g = torch.Generator().manual_seed(0)
    total = torch.randn(64, 32, generator=g).to(DEVICE)
    a, b = (torch.randn(shape, generator=g).bfloat16().to(DEVICE) for shape in ((64, 128), (128, 32)))
    exact, rounded = total.double() + a.double() @ b.double(), total + (a @ b)
    head._add_product(total, a, b)
    assert total.dtype == torch.float32
    assert (total - exact).norm() <= (rounded - exact).norm() * (1 if DEVICE.type == "cpu" else 0.1)


# --- measures ---


def exact_measures(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logps = logits.double().log_softmax(-1)
    return {
        "top1": (logits.argmax(-1) == targets).double(),
        "collision": (2 * logps).logsumexp(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
    }


@every_module
@every_head
@every_scale
def test_measures_equal_float64_and_change_nothing_else(
    module: ModuleType, train_head: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever chunks; log-probs and gradients are those of a call that does not ask, to the bit."""
    monkeypatch.setattr(module, "chunk_rows", lambda weight: 7)
    hidden, weight, targets, grad = inputs(scale=scale)
    logits = hidden.double() @ weight.double().T
    targets[::2] = logits.argmax(-1)[::2]
    exact = exact_measures(logits, targets)
    assert 0 < exact["top1"].sum() < M
    seen: list[Tensor] = []

    def measured(*arguments: Tensor) -> Tensor:
        logps, *values = module.token_logps(*arguments, measures=tuple(exact))
        seen.extend(values)
        return logps

    found = results(measured, hidden, weight, targets, grad, train_head=train_head)
    for mine, right in zip(seen, exact.values(), strict=True):
        assert (mine.double() - right).abs().max() <= 2e-6 * max(1.0, float(logits.abs().max()))
    for mine, same in zip(
        found, results(module.token_logps, hidden, weight, targets, grad, train_head=train_head), strict=True
    ):
        assert torch.equal(mine, same)


@every_module
def test_measures_come_in_the_order_that_they_are_asked_for_and_have_no_gradient(module: ModuleType) -> None:
    hidden, weight, targets, _ = inputs(rows=5)
    hidden.requires_grad_()
    both = module.token_logps(hidden, weight, targets, measures=("entropy", "collision"))
    swapped = module.token_logps(hidden, weight, targets, measures=("collision", "entropy"))
    assert torch.equal(both[[0, 2, 1]], swapped) and not torch.equal(both, swapped)
    both[1:].sum().backward()
    assert hidden.grad is None or not hidden.grad.any()
    assert module.token_logps(hidden[:0], weight, targets[:0], measures=("top1",)).shape == (2, 0)


@every_module
def test_of_equal_logits_the_first_is_the_most_likely_token(module: ModuleType) -> None:
    """As greedy decoding has it; a model that says nothing is not right everywhere."""
    _, weight, _, _ = inputs()
    targets = torch.tensor([0, 1, V - 1], device=DEVICE)
    _, top1 = module.token_logps(torch.zeros(3, H, device=DEVICE), weight, targets, measures=("top1",))
    assert top1.tolist() == [1.0, 0.0, 0.0]


def test_measures_cost_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    unasked = {name: lambda *_: pytest.fail("nobody asked") for name in reference.MEASURES}
    monkeypatch.setattr(reference, "MEASURES", unasked)
    reference.token_logps(*inputs()[:3])
