"""The attention kernels against the one rule written out as a dense mask, in float64: values, gradients and errors.

Where there is no GPU they run in Triton's interpreter, in milliseconds an operation; so rows and tiles are small here,
and each row crosses what it can at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.compiling import Request, compiled, has_compiler
from tuner import kernels
from tuner.data.pack import pack
from tuner.kernels.attention import tiles
from tuner.model.attention import dense_mask
from tuner.model.policy import Policy
from tuner.types import Batch, Segment, Tokens, span

triton = pytest.importorskip("tuner.kernels.attention.triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = triton.Config(16, 16, 4, 1)
Attend = Callable[[Tensor, Tensor, Tensor, Batch, int | None], Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "configs", lambda *_: triton.Configs(SMALL, SMALL, SMALL))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is not written is NaN, and so is what nobody should have read."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with monkeypatch.context() as patched:
        patched.setattr(triton, "torch", SimpleNamespace(**{**vars(torch), "empty": poison}))
        yield


def document(trunk: int, *branches: int) -> Tokens:
    return Tokens((span(range(trunk), False),) if trunk else (), tuple((span(range(n), True),) for n in branches))


def random_row(seed: int, documents: int = 3, longest: int = 20) -> Batch:
    """Trees of random sizes: with and without trunk, with 0 to 3 branches, tokens that are documents of their own."""
    rng = np.random.default_rng(seed)
    samples = [document(1)]
    for _ in range(documents):
        branches = [int(n) for n in rng.integers(1, longest, rng.integers(0, 4))]
        samples.append(document(int(rng.integers(0 if branches else 1, longest)), *branches))
    return pack(samples, multiple=4)


ROWS = {
    "edges": lambda: pack([document(15), document(16), document(17), document(1)]),
    "trunks": lambda: pack([document(17, 16, 1), document(0, 15, 2), document(1, 1, 1, 1)]),
    "long": lambda: pack([document(36, 5, 21)]),
    "random": lambda: random_row(0),
}


def qkv(batch: Batch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output as a model has them: views whose heads lie inside of tokens."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, batch.num_tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return [q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), grad]


def run(attend: Attend, batch: Batch, window: int | None, tensors: list[Tensor]) -> list[Tensor]:
    """[output, dq, dk, dv]."""
    q, k, v = (t.detach().to(DEVICE).requires_grad_() for t in tensors[:3])
    output = attend(q, k, v, batch, window)
    output.backward(tensors[3].to(DEVICE))
    return [t.detach().cpu() for t in (output, *(x.grad for x in (q, k, v) if x.grad is not None))]


def ours(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None) -> Tensor:
    return triton.attention(q, k, v, batch.plan, scaling=q.shape[-1] ** -0.5, window=window)


def plain(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None) -> Tensor:
    """softmax(q k^T) v under the dense mask of the rule."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = ~dense_mask(batch, window).to(q.device)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def check(attend: Attend, batch: Batch, window: int | None, tensors: list[Tensor]) -> None:
    """Invariant 11: the error against float64 is at most 1.5 times that of plain torch in the same dtype."""
    exact = run(plain, batch, window, [t.double() for t in tensors])
    found, torchs = run(attend, batch, window, tensors), run(plain, batch, window, tensors)
    for name, a, b, x in zip(("output", "dq", "dk", "dv"), found, torchs, exact, strict=True):
        assert a.dtype == tensors[0].dtype and a.shape == x.shape and torch.isfinite(a).all(), name
        error, allowed = (a.double() - x).norm(), 1.5 * (b.double() - x).norm()
        assert error <= allowed + 1e-6, f"{name}: {error:.3e} > {allowed:.3e}"


# --- the rule ---


@pytest.mark.parametrize(
    ("row", "heads", "kv_heads", "dim", "window", "dtype"),
    [
        ("edges", 2, 2, 16, None, torch.float32),
        ("edges", 1, 1, 48, 16, torch.bfloat16),
        ("trunks", 4, 1, 16, None, torch.bfloat16),
        ("trunks", 2, 1, 32, 9, torch.float32),
        ("long", 2, 1, 64, None, torch.bfloat16),
        ("long", 1, 1, 16, 17, torch.float32),
        ("random", 4, 2, 16, None, torch.float32),
        ("random", 2, 1, 24, 5, torch.float16),
    ],
)
def test_the_kernels_compute_the_rule_as_exactly_as_plain_torch(
    row: str, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    batch = ROWS[row]()
    check(ours, batch, window, qkv(batch, heads, kv_heads, dim, dtype))


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (((32, 16), (32, 16), (16, 32)), None),
        (((32, 16), (32, 16), (16, 32)), 7),  # the last queries of a tile see nothing of its first keys
        (((16, 32), (16, 32), (32, 16)), None),
    ],
)
def test_tiles_of_any_size(
    sizes: tuple[tuple[int, int], ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = triton.Configs(*(triton.Config(kept, streamed, 4, 1) for kept, streamed in sizes))
    monkeypatch.setattr(triton, "configs", lambda *_: made)
    batch = ROWS["trunks"]()
    check(ours, batch, window, qkv(batch, 1, 1, 16, torch.float32))


CONFIGS = triton.configs  # before the fixture puts small ones in their place


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("trunk", [129, 60])
def test_the_tiles_of_a_gpu(dim: int, trunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "configs", CONFIGS)
    batch = pack([document(trunk, trunk - 2, trunk - 1)])
    check(ours, batch, None, qkv(batch, 1, 1, dim, torch.bfloat16))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("mean", [1.0, 1000.0])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_two_kernels_share_the_table_of_query_tiles(dim: int, mean: float, half: bool) -> None:
    made = CONFIGS(dim, half, mean)
    assert made.forward.kept == made.grad_query.kept


def test_large_scores_stay_finite() -> None:
    """exp(1000) is not a number of 32 bits."""
    batch = ROWS["random"]()
    tensors = qkv(batch, 1, 1, 16, torch.float32)
    tensors[0], tensors[1] = tensors[0] * 40, tensors[1] * 40
    for mine, exact in zip(
        run(ours, batch, 7, tensors), run(plain, batch, 7, [t.double() for t in tensors]), strict=True
    ):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_same_bytes_every_time_and_with_or_without_gradient() -> None:
    batch = random_row(1, documents=2)
    tensors = qkv(batch, 2, 1, 16, torch.bfloat16)
    first, again = run(ours, batch, None, tensors), run(ours, batch, None, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    q, k, v = (t.to(DEVICE).requires_grad_() for t in tensors[:3])
    with torch.no_grad():
        output = ours(q, k, v, batch, None)
    assert not output.requires_grad and torch.equal(output.cpu(), first[0])


def test_under_checkpointing_and_with_strides_of_any_kind() -> None:
    """A gradient that is one number spread out, queries whose heads lie apart, values taken out of wider rows."""
    batch = ROWS["edges"]()
    q, k, v, _ = qkv(batch, 2, 1, 16, torch.float32)
    q, v = q.contiguous(), torch.cat([v, v], dim=-1)[..., ::2]
    results = []
    for attend in (ours, plain):
        leaves = [x.detach().to(DEVICE).requires_grad_() for x in (q, k, v)]
        assert attend is plain or leaves[2].stride(-1) != 1 or DEVICE.type == "cuda"
        checkpoint(attend, *leaves, batch, None, use_reentrant=False).sum().backward()
        results.append([x.grad for x in leaves])
    for mine, same in zip(*results, strict=True):
        torch.testing.assert_close(mine, same, rtol=0, atol=1e-5)


def test_an_empty_row_and_what_is_refused() -> None:
    q, k, v = (torch.zeros(1, 2, 0, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    output = triton.attention(q, k, v, (), scaling=0.25)
    output.sum().backward()
    assert output.shape == (1, 0, 2, 16) and q.grad is not None and q.grad.shape == q.shape
    with pytest.raises(ValueError, match="no dropout of attention weights"):
        triton.attention(q, k, v, (), scaling=0.25, dropout=0.1)


# --- the tables ---


def test_tables_of_a_row_that_can_be_read() -> None:
    batch = pack([document(5, 2, 3), document(4)])
    made = tiles.build(batch.plan, 14, 4, 4, torch.device("cpu"))
    # first row, row behind the last, where the trunk begins, its length, row of position 0 behind the trunk
    wanted = [[7, 10, 0, 5, 2], [5, 7, 0, 5, 0], [4, 5, 0, 0, 0], [0, 4, 0, 0, 0], [10, 14, 10, 0, 10]]
    assert made.queries[:, :5].tolist() == wanted
    # first row, row behind the last, ends of the segment and of the queries
    assert made.keys.tolist() == [[0, 4, 5, 10], [4, 5, 5, 10], [10, 14, 14, 14], [7, 10, 10, 10], [5, 7, 7, 7]]
    assert made.positions.tolist() == batch.position_ids.tolist()
    assert made.longest == 8


def test_tables_are_made_once_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = random_row(5), random_row(6)
    first = tiles.tiles(one.plan, one.num_tokens, 16, 16, DEVICE)
    assert tiles.tiles(two.plan, two.num_tokens, 16, 16, DEVICE) is not first
    assert tiles.tiles(one.plan, one.num_tokens, 16, 16, DEVICE) is first
    assert tiles.tiles(one.plan, one.num_tokens, 32, 16, DEVICE) is not first


@pytest.mark.parametrize(
    "plan",
    [
        (Segment((0, 4), ((0, 4),)), Segment((4, 6), ((4, 6),)), Segment((6, 8), ((0, 4), (6, 8)))),  # branch elsewhere
        (Segment((0, 4), ((0, 4),)), Segment((4, 8), ((0, 2), (4, 8)))),  # part of a trunk
        (Segment((0, 4), ((0, 4),)), Segment((4, 8), ((0, 4), (4, 6), (4, 8)))),
        (Segment((0, 4), ((0, 4),)), Segment((5, 8), ((5, 8),))),  # a gap
        (Segment((0, 4), ((0, 4),)),),  # too short
    ],
)
def test_a_plan_that_the_tables_cannot_say_is_refused(plan: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="each trunk, then its branches|the plan covers 4 tokens"):
        tiles.build(plan, 8, 16, 16, torch.device("cpu"))


# --- mutants, which the check above must catch ---


def _mutant_trunk_is_later(made: tiles.Tiles) -> tiles.Tiles:
    """A branch sees its trunk causally by row, not by position."""
    queries = made.queries.clone()
    queries[:, 3] = (queries[:, 3] - 1).clamp(min=0)
    return replace(made, queries=queries)


def _mutant_sibling(made: tiles.Tiles) -> tiles.Tiles:
    """A branch sees the sibling before it as if it were trunk."""
    queries = made.queries.clone()
    first = queries[:, 3] > 0
    queries[:, 3][first] = queries[:, 4][first] + queries[:, 3][first] - queries[:, 2][first]
    queries[:, 4][first] = queries[:, 2][first]
    return replace(made, queries=queries)


def _mutant_keys_of_the_trunk_alone(made: tiles.Tiles) -> tiles.Tiles:
    """A trunk's keys get no gradient from its branches."""
    keys = made.keys.clone()
    keys[:, 3] = keys[:, 2]
    return replace(made, keys=keys)


def _mutant_a_tile_is_missing(made: tiles.Tiles) -> tiles.Tiles:
    return replace(made, queries=made.queries[1:])


@pytest.mark.parametrize(
    ("mutant", "caught"),
    [
        (_mutant_trunk_is_later, "output"),
        (_mutant_sibling, "output"),
        (_mutant_keys_of_the_trunk_alone, "dk"),
        (_mutant_a_tile_is_missing, "output"),
    ],
)
def test_mutant_tables(
    mutant: Callable[[tiles.Tiles], tiles.Tiles], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack([document(9, 5, 6)])
    monkeypatch.setattr(triton, "tiles", lambda *asked: mutant(tiles.build(*asked)))
    with pytest.raises(AssertionError, match=caught):
        check(ours, batch, None, qkv(batch, 1, 1, 16, torch.bfloat16))


def test_mutant_a_window_off_by_one_and_a_head_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack([document(9, 5, 6)])
    with pytest.raises(AssertionError, match="output"):
        check(lambda q, k, v, b, w: ours(q, k, v, b, 8), batch, 7, qkv(batch, 1, 1, 16, torch.bfloat16))
    backward = triton._backward_pass

    def dropped(grad: Tensor, *rest: Any) -> list[Tensor]:
        less = grad.clone()
        less[:, -1] = 0
        return [backward(grad, *rest)[0], *backward(less, *rest)[1:]]

    monkeypatch.setattr(triton, "_backward_pass", dropped)
    with pytest.raises(AssertionError, match="dk"):
        check(ours, batch, None, qkv(batch, 2, 1, 16, torch.bfloat16))


# --- in a model ---


def test_a_policy_scores_and_learns_the_same(make_model: Callable[..., Any]) -> None:
    batch = pack([document(9, 5, 6), document(12)])
    results = []
    for name in ("tuner_varlen", "triton"):
        functions = kernels.load("reference", name)
        policy = Policy(
            make_model(num_hidden_layers=1), compute_dtype=torch.float32, kernels=functions, attn_implementation=name
        ).to(DEVICE)
        logps = policy(batch.to(DEVICE))
        logps.sum().backward()
        grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        results.append((logps.detach(), grads))
    (logps, grads), (same, same_grads) = results
    torch.testing.assert_close(logps, same, rtol=0, atol=1e-6)
    assert grads.keys() == same_grads.keys() and any("q_proj" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, same_grads[name], rtol=0, atol=1e-5, msg=name)


# --- the compiler ---

STRIDES = ("stride_qh", "stride_qn", "stride_kh", "stride_kn", "stride_vh", "stride_vn")
GRAD_STRIDES = ("stride_gh", "stride_gn")


def requests(dim: int, kind: str, mean: float = 1000.0, windowed: bool = False) -> list[Request]:
    """The three kernels as `attention` starts them for a Llama 3 of this head dim."""
    made, tensor = CONFIGS(dim, kind != "fp32", mean), f"*{kind}:16"
    signature = {**dict.fromkeys(("q", "k", "v"), tensor), "lse": "*fp32:16", "tiles": "*i32:16"}
    signature |= {"n": "i32", "window": "i32", "scale": "fp32", **dict.fromkeys(STRIDES, "i32:16")}
    back = {
        **signature,
        "grad": tensor,
        "delta": "*fp32:16",
        "scaling": "fp32",
        **dict.fromkeys(GRAD_STRIDES, "i32:16"),
    }
    constants = {"GROUP": 4, "HEAD_DIM": dim, "D": dim, "BASE_2": kind != "fp32", "WINDOWED": windowed}

    def request(name: str, config: Any, signature: dict[str, str], **more: object) -> Request:
        return Request(f"{triton.__name__}:{name}", signature, constants | more, config.warps, config.stages)

    def queries(config: Any) -> dict[str, object]:
        return {"HEADS": 32, "QUERIES": config.kept, "KEYS": config.streamed, "COLUMNS": 8}

    keys = {"KV_HEADS": 8, "QUERIES": made.grad_key.streamed, "KEYS": made.grad_key.kept, "COLUMNS": 4}
    outs = {"dk": tensor, "dv": tensor, "positions": "*i32:16"}
    return [
        request("_forward", made.forward, signature | {"out": tensor}, KEEP=True, **queries(made.forward)),
        request("_grad_query", made.grad_query, back | {"out": tensor, "dq": tensor}, **queries(made.grad_query)),
        request("_grad_key", made.grad_key, back | outs, **keys),
    ]


@has_compiler
def test_the_compiler_takes_the_kernels_and_keeps_them_in_registers() -> None:
    """Tensor cores at full width, and hardly anything spilled (loop invariants, outside of the inner loops)."""
    for report in compiled(requests(128, "bf16")):
        assert report.wgmma and report.stack <= 256 and report.shared <= 227 * 1024


@has_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mean", "windowed"),
    [("bf16", 1000.0, True), ("bf16", 1.0, False), ("fp16", 1.0, True), ("fp32", 1000.0, False)],
)
def test_the_compiler_takes_every_form(kind: str, mean: float, windowed: bool) -> None:
    for dim in (64, 128):
        for report in compiled(requests(dim, kind, mean, windowed)):
            assert report.wgmma == (kind != "fp32") and report.stack <= 1024 and report.shared <= 227 * 1024
