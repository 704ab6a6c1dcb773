"""The one attention rule in Triton: packed rows, shared trunks, grouped heads and windows, forward and backward.

FlashAttention-2 (arXiv:2307.08691) over the tiles that `tiles.py` works out on the host: a program reads a trunk where
it lies and visits what its queries see and nothing else. No two programs write the same rows and none uses atomics, so
the same inputs give the same bytes. Sums and softmax are in fp32; probabilities and their gradients are rounded to the
dtype of the inputs before they are multiplied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tuner.kernels.attention import MAX_HEAD_DIM
from tuner.kernels.attention.reference import Plan
from tuner.kernels.attention.tiles import KEY_COLUMNS, QUERY_COLUMNS, Tiles, mean_length, tiles
from tuner.kernels.portable import INTERPRETED, dot, rounded

# --- sizes ---


@dataclass(frozen=True)
class Config:
    """Sizes of one kernel: tokens of the tile that a program keeps and of those that it streams past it."""

    kept: int
    streamed: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configs:
    """The kernels of a row. The two over query tiles keep tiles of one size, and so share their table."""

    forward: Config
    grad_query: Config
    grad_key: Config


def configs(head_dim: int, half: bool, mean: float) -> Configs:
    """Sizes by a fixed rule over the head dim, the dtype (16 bits or 32) and the mean length of the row's segments.

    So they are the same in every run: what is worked out depends on them in its last bits. The reasons, from what the
    compiler makes of each for an H100: a warp group multiplies 64 rows at once, so 64 or 128 are kept. Where a thread
    needs 128 registers at most (head dim 64), two programs run on a multiprocessor side by side, one at softmax while
    the other multiplies; else one has it for itself, and streams as much as its registers hold.
    """
    if not half:  # multiplied without tensor cores, from registers
        return Configs(Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 1))
    if mean < 128:  # of larger tiles more than half would be empty
        return Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2))
    if head_dim <= 64:
        return Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 64, 8, 2))
    return Configs(Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 64, 8, 2))


# --- kernels: tables, and positions in a document, as in tiles.py ---


@triton.jit
def _exp(x, BASE_2: tl.constexpr):
    """The exponential, of base 2 where `scale` and log-sum-exps are of that base, which saves a product a score.

    In base e that product comes after the maximum is taken off and rounds less, and a library's function stands in for
    the approximation of the hardware; 16-bit tensors do not show either.
    """
    if BASE_2:
        return tl.exp2(x)
    elif INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _log(x, BASE_2: tl.constexpr):
    """The logarithm of the same base."""
    if BASE_2:
        return tl.log2(x)
    elif INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.log(x)


@triton.jit
def _load_lse(lse, i, inside, size, BASE_2: tl.constexpr):
    """What the forward has kept of queries i: log-sum-exps, infinite where not `inside`, so that probabilities are 0.

    In base e they are kept as maximum m and log l, for their sum would round off what 32 bits can tell.
    """
    m = tl.load(lse + i, mask=inside, other=float("inf"))
    if BASE_2:
        return m, m
    else:
        return m, tl.load(lse + size + i, mask=inside, other=0.0)


@triton.jit
def _softmax(scores, m, log_l, BASE_2: tl.constexpr):
    """The probabilities of scaled scores, from what `_load_lse` gives."""
    if BASE_2:
        return _exp(scores - m, BASE_2)
    else:
        return _exp(scores - m - log_l, BASE_2)


@triton.jit
def _load(base, rows, stride, inside, EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows of a head, `[rows, D]`; zeros behind its dim and, with EDGE, where not `inside`."""
    d = tl.arange(0, D)
    at = base + rows[:, None] * stride + d[None, :]
    if EDGE and HEAD_DIM < D:
        return tl.load(at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif EDGE:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif HEAD_DIM < D:
        return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(base, rows, stride, inside, x, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    at = base + rows[:, None] * stride + d[None, :]
    tl.store(at, rounded(x, base.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _seen(position, j, window, EDGE: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether queries at `position` see keys at positions j, `[queries, keys]`."""
    if EDGE and WINDOWED:
        return (j[None, :] <= position[:, None]) & (position[:, None] - j[None, :] < window)
    elif WINDOWED:
        return position[:, None] - j[None, :] < window
    else:
        return j[None, :] <= position[:, None]


@triton.jit
def _keys_of(start, stop, length, behind, window, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """Of a query tile: the first position to look at, from where on keys have to be masked, and the last + 1."""
    first = 0
    if WINDOWED:
        first = tl.maximum(start - behind - window + 1, 0)
    masked = first + (start - behind + 1 - first) // KEYS * KEYS
    return first, masked, stop - behind


@triton.jit
def _forward_step(
    q, k, v, m, total, o, at, last, position, trunk, length, behind, stride_kn, stride_vn, scale, window,
    KEYS: tl.constexpr, EDGE: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BASE_2: tl.constexpr,
):  # fmt: skip
    """Takes the keys from position `at` on into the running maximum, sum and output of softmax."""
    j = at + tl.arange(0, KEYS)
    rows = (j + tl.where(j < length, trunk, behind)).to(tl.int64)
    keys = _load(k, rows, stride_kn, j < last, EDGE, HEAD_DIM, D)
    scores = dot(q, tl.trans(keys), tl.zeros([q.shape[0], KEYS], tl.float32))
    if EDGE or WINDOWED:
        scores = tl.where(_seen(position, j, window, EDGE, WINDOWED), scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1) * scale)
    subtracted = highest
    if WINDOWED:  # a query may see nothing of the first tiles
        subtracted = tl.where(highest == float("-inf"), 0.0, highest)
    p = _exp(scores * scale - subtracted[:, None], BASE_2)
    shrunk = _exp(m - subtracted, BASE_2)
    values = _load(v, rows, stride_vn, j < last, EDGE, HEAD_DIM, D)
    o = dot(rounded(p, values.dtype), values, o * shrunk[:, None])
    return highest, total * shrunk + tl.sum(p, 1), o


@triton.jit(do_not_specialize=["n", "window"])
def _forward(
    q, k, v, out, lse, tiles, n, window, scale,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BASE_2: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Output of one query tile and head. With KEEP its log-sum-exps, as `_load_lse` reads them."""
    tile = tiles + tl.program_id(0) // HEADS * COLUMNS
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    start, stop = tl.load(tile), tl.load(tile + 1)
    trunk, length, behind = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    i = start + tl.arange(0, QUERIES)
    inside = i < stop
    position = i - behind
    queries = _load(q + head * stride_qh, i.to(tl.int64), stride_qn, inside, True, HEAD_DIM, D)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    first, masked, last = _keys_of(start, stop, length, behind, window, KEYS, WINDOWED)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    o = tl.zeros([QUERIES, D], tl.float32)
    for at in range(first, masked, KEYS):
        m, total, o = _forward_step(
            queries, k, v, m, total, o, at, last, position, trunk, length, behind, stride_kn, stride_vn, scale, window,
            KEYS, False, WINDOWED, HEAD_DIM, D, BASE_2,
        )  # fmt: skip
    for at in range(masked, last, KEYS):
        m, total, o = _forward_step(
            queries, k, v, m, total, o, at, last, position, trunk, length, behind, stride_kn, stride_vn, scale, window,
            KEYS, True, WINDOWED, HEAD_DIM, D, BASE_2,
        )  # fmt: skip
    total = tl.where(inside, total, 1.0)  # rows behind the tile may have seen nothing
    _store(out + head * HEAD_DIM, i.to(tl.int64), HEADS * HEAD_DIM, inside, o / total[:, None], HEAD_DIM, D)
    at = head * n + i
    if KEEP and BASE_2:
        tl.store(lse + at, m + _log(total, BASE_2), mask=inside)
    elif KEEP:
        tl.store(lse + at, m, mask=inside)
        tl.store(lse + HEADS * n.to(tl.int64) + at, _log(total, BASE_2), mask=inside)


@triton.jit
def _grad_query_step(
    q, k, v, grad, m, log_l, delta, dq, at, last, position, trunk, length, behind, stride_kn, stride_vn, scale, window,
    KEYS: tl.constexpr, EDGE: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BASE_2: tl.constexpr,
):  # fmt: skip
    """Takes the keys from position `at` on into dQ."""
    j = at + tl.arange(0, KEYS)
    rows = (j + tl.where(j < length, trunk, behind)).to(tl.int64)
    keys = _load(k, rows, stride_kn, j < last, EDGE, HEAD_DIM, D)
    values = _load(v, rows, stride_vn, j < last, EDGE, HEAD_DIM, D)
    zeros = tl.zeros([q.shape[0], KEYS], tl.float32)
    scores = dot(q, tl.trans(keys), zeros) * scale
    if EDGE or WINDOWED:
        scores = tl.where(_seen(position, j, window, EDGE, WINDOWED), scores, float("-inf"))
    p = _softmax(scores, m[:, None], log_l[:, None], BASE_2)
    ds = p * (dot(grad, tl.trans(values), zeros) - delta[:, None])
    return dot(rounded(ds, keys.dtype), keys, dq)


@triton.jit(do_not_specialize=["n", "window"])
def _grad_query(
    q, k, v, out, grad, lse, delta, dq, tiles, n, window, scale, scaling,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_gh, stride_gn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BASE_2: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile and head, and delta = Σ_d dO O, which the gradient of the keys needs too."""
    tile = tiles + tl.program_id(0) // HEADS * COLUMNS
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    start, stop = tl.load(tile), tl.load(tile + 1)
    trunk, length, behind = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    i = start + tl.arange(0, QUERIES)
    inside = i < stop
    position = i - behind
    queries = _load(q + head * stride_qh, i.to(tl.int64), stride_qn, inside, True, HEAD_DIM, D)
    grads = _load(grad + head * stride_gh, i.to(tl.int64), stride_gn, inside, True, HEAD_DIM, D)
    outs = _load(out + head * HEAD_DIM, i.to(tl.int64), HEADS * HEAD_DIM, inside, True, HEAD_DIM, D)
    wide = tl.float32 if BASE_2 else tl.float64
    d = tl.sum(grads.to(wide) * outs.to(wide), 1).to(tl.float32)
    at = head * n + i
    tl.store(delta + at, d, mask=inside)
    m, log_l = _load_lse(lse, at, inside, HEADS * n.to(tl.int64), BASE_2)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    first, masked, last = _keys_of(start, stop, length, behind, window, KEYS, WINDOWED)
    sums = tl.zeros([QUERIES, D], tl.float32)
    for at in range(first, masked, KEYS):
        sums = _grad_query_step(
            queries, k, v, grads, m, log_l, d, sums, at, last, position, trunk, length, behind, stride_kn, stride_vn,
            scale, window, KEYS, False, WINDOWED, HEAD_DIM, D, BASE_2,
        )  # fmt: skip
    for at in range(masked, last, KEYS):
        sums = _grad_query_step(
            queries, k, v, grads, m, log_l, d, sums, at, last, position, trunk, length, behind, stride_kn, stride_vn,
            scale, window, KEYS, True, WINDOWED, HEAD_DIM, D, BASE_2,
        )  # fmt: skip
    _store(dq + head * HEAD_DIM, i.to(tl.int64), HEADS * HEAD_DIM, inside, sums * scaling, HEAD_DIM, D)


@triton.jit
def _grad_key_step(
    keys, values, q, grad, lse, size, delta, dk, dv, at, last, j, position, positions, stride_qn, stride_gn, scale,
    window, QUERIES: tl.constexpr, EDGE: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BASE_2: tl.constexpr,
):  # fmt: skip
    """Takes the queries from row `at` on into dK and dV; scores are transposed, `[keys, queries]`.

    Queries from row `last` on count for nothing: their m is infinite, so p = 0.
    """
    i = at + tl.arange(0, QUERIES)
    inside = i < last
    row = tl.arange(0, QUERIES)  # offsets in the tile fit in 32 bits, and do not change from tile to tile
    queries = _load(q + at * tl.cast(stride_qn, tl.int64), row, stride_qn, inside, True, HEAD_DIM, D)
    grads = _load(grad + at * tl.cast(stride_gn, tl.int64), row, stride_gn, inside, True, HEAD_DIM, D)
    m, log_l = _load_lse(lse, i, inside, size, BASE_2)
    zeros = tl.zeros([keys.shape[0], QUERIES], tl.float32)
    scores = dot(keys, tl.trans(queries), zeros) * scale
    if EDGE:
        seen = j[:, None] <= i[None, :]
        if WINDOWED:
            seen &= tl.load(positions + i, mask=inside, other=0)[None, :] - position[:, None] < window
        scores = tl.where(seen, scores, float("-inf"))
    p = _softmax(scores, m[None, :], log_l[None, :], BASE_2)
    dv = dot(rounded(p, grads.dtype), grads, dv)
    d = tl.load(delta + i, mask=inside, other=0.0)
    ds = p * dot(values, tl.trans(grads), zeros - d[None, :])  # delta is taken off here: it needs no registers later
    return dot(rounded(ds, queries.dtype), queries, dk), dv


@triton.jit(do_not_specialize=["n", "window"])
def _grad_key(
    q, k, v, grad, lse, delta, dk, dv, tiles, positions, n, window, scale, scaling,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_gh, stride_gn,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BASE_2: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile and key head, over the query heads of its group in order."""
    tile = tiles + tl.program_id(0) // KV_HEADS * COLUMNS
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    start, stop, own, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    j = start + tl.arange(0, KEYS)
    inside = j < stop
    rows = tl.minimum(j, stop - 1).to(tl.int64)  # behind the tile its last key again, whose scores are of one size
    keys = _load(k + head * stride_kh, rows, stride_kn, inside, False, HEAD_DIM, D)
    values = _load(v + head * stride_vh, rows, stride_vn, inside, False, HEAD_DIM, D)
    position = tl.load(positions + j, mask=inside, other=0)
    size = KV_HEADS * GROUP * n.to(tl.int64)
    dks, dvs = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        q_h, grad_h = q + query_head * stride_qh, grad + query_head * stride_gh
        lse_h, delta_h = lse + query_head * n, delta + query_head * n
        if WINDOWED:
            for at in range(start, tl.minimum(own, stop - 1 + window), QUERIES):
                dks, dvs = _grad_key_step(
                    keys, values, q_h, grad_h, lse_h, size, delta_h, dks, dvs, at, own, j, position, positions,
                    stride_qn, stride_gn, scale, window, QUERIES, True, True, HEAD_DIM, D, BASE_2,
                )  # fmt: skip
            for at in range(own, last, QUERIES):  # of branches, each of which leaves the window by itself
                i = at + tl.arange(0, QUERIES)
                nearest = tl.min(tl.load(positions + i, mask=i < last, other=2147483647), 0)
                if nearest - tl.load(positions + stop - 1) < window:
                    dks, dvs = _grad_key_step(
                        keys, values, q_h, grad_h, lse_h, size, delta_h, dks, dvs, at, last, j, position, positions,
                        stride_qn, stride_gn, scale, window, QUERIES, True, True, HEAD_DIM, D, BASE_2,
                    )  # fmt: skip
        else:
            plain: tl.constexpr = max(KEYS, QUERIES)  # so far behind the first key, queries see all of the tile
            for at in range(start, tl.minimum(start + KEYS, last), QUERIES):
                dks, dvs = _grad_key_step(
                    keys, values, q_h, grad_h, lse_h, size, delta_h, dks, dvs, at, last, j, position, positions,
                    stride_qn, stride_gn, scale, window, QUERIES, True, False, HEAD_DIM, D, BASE_2,
                )  # fmt: skip
            for at in range(start + plain, last, QUERIES):
                dks, dvs = _grad_key_step(
                    keys, values, q_h, grad_h, lse_h, size, delta_h, dks, dvs, at, last, j, position, positions,
                    stride_qn, stride_gn, scale, window, QUERIES, False, False, HEAD_DIM, D, BASE_2,
                )  # fmt: skip
    _store(dk + head * HEAD_DIM, j.to(tl.int64), KV_HEADS * HEAD_DIM, inside, dks * scaling, HEAD_DIM, D)
    _store(dv + head * HEAD_DIM, j.to(tl.int64), KV_HEADS * HEAD_DIM, inside, dvs, HEAD_DIM, D)


# --- around them ---


@dataclass(frozen=True, eq=False)
class _Shape:
    """What the kernels of one call are told beside tensors."""

    scaling: float
    window: int | None  # None where it reaches over the longest document
    group: int  # query heads of a key head
    head_dim: int
    base_2: bool  # whether the tensors have 16 bits
    tables: Tiles
    sizes: Configs

    def constants(self, config: Config) -> dict[str, Any]:
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "D": max(16, triton.next_power_of_2(self.head_dim)),
            "BASE_2": self.base_2,
            "WINDOWED": self.window is not None,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    @property
    def scale(self) -> float:
        """What scores are multiplied by before `_exp`."""
        return self.scaling * math.log2(math.e) if self.base_2 else self.scaling


def _strides(*xs: Tensor) -> tuple[int, ...]:
    """Of heads and tokens of each `[1, heads, N, D]`."""
    return tuple(stride for x in xs for stride in x.stride()[1:3])


def _by_dims(x: Tensor) -> Tensor:
    """`x` itself where its last dimension lies in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward_pass(query: Tensor, key: Tensor, value: Tensor, shape: _Shape, keep: bool) -> tuple[Tensor, Tensor]:
    """Output `[1, N, heads, D]` and, with `keep`, log-sum-exps or their two parts `[1 or 2, heads, N]`."""
    _, heads, n, dim = query.shape
    output = torch.empty(1, n, heads, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(1 if shape.base_2 else 2, heads, n if keep else 0, dtype=torch.float32, device=query.device)
    config, table = shape.sizes.forward, shape.tables.queries
    with torch.cuda.device_of(query):
        _forward[(len(table) * heads,)](
            query, key, value, output, lse, table, n, shape.window or 0, shape.scale,
            *_strides(query, key, value),
            HEADS=heads, QUERIES=config.kept, KEYS=config.streamed, COLUMNS=QUERY_COLUMNS, KEEP=keep,
            **shape.constants(config),
        )  # fmt: skip
    return output, lse


def _backward_pass(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, shape: _Shape
) -> list[Tensor]:
    """Gradients of query, key and value, each `[1, N, heads, D]`."""
    grads = [
        torch.empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype, device=x.device) for x in (query, key, value)
    ]
    _, heads, n = lse.shape
    delta = torch.empty(heads, n, dtype=torch.float32, device=query.device)
    numbers = (n, shape.window or 0, shape.scale, shape.scaling, *_strides(query, key, value, grad))
    config, table = shape.sizes.grad_query, shape.tables.queries
    with torch.cuda.device_of(query):
        _grad_query[(len(table) * heads,)](
            query, key, value, output, grad, lse, delta, grads[0], table, *numbers,
            HEADS=heads, QUERIES=config.kept, KEYS=config.streamed, COLUMNS=QUERY_COLUMNS, **shape.constants(config),
        )  # fmt: skip
        config, table = shape.sizes.grad_key, shape.tables.keys
        _grad_key[(len(table) * key.shape[1],)](
            query, key, value, grad, lse, delta, grads[1], grads[2], table, shape.tables.positions, *numbers,
            KV_HEADS=key.shape[1], QUERIES=config.streamed, KEYS=config.kept, COLUMNS=KEY_COLUMNS,
            **shape.constants(config),
        )  # fmt: skip
    return grads


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and one number a query and head (two in fp32)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shape: _Shape) -> Tensor:
        output, lse = _forward_pass(query, key, value, shape, keep=True)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.shape = shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grad = _by_dims(grads[0].transpose(1, 2))
        found = _backward_pass(grad, query, key, value, output, lse, ctx.shape)
        return (*(x.transpose(1, 2) for x in found), None)


def attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scaling: float, window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`reference.attention` of bf16, fp16 or fp32 tensors with a head dim of up to 128; strides may be any.

    Raises:
        ValueError: dropout of attention weights, which these kernels do not have.
    """
    if dropout:
        raise ValueError("the Triton attention has no dropout of attention weights; use tuner_varlen")
    heads, n, dim = query.shape[1:]
    assert dim <= MAX_HEAD_DIM["triton"] and scaling > 0 and query.dtype == key.dtype == value.dtype
    half = query.element_size() == 2
    sizes = configs(dim, half, mean_length(plan))
    tables = tiles(plan, n, sizes.forward.kept, sizes.grad_key.kept, query.device)
    windowed = window if window is not None and window < tables.longest else None
    shape = _Shape(scaling, windowed, heads // key.shape[1], dim, half, tables, sizes)
    query, key, value = _by_dims(query), _by_dims(key), _by_dims(value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Attention.apply(query, key, value, shape)
    return _forward_pass(query, key, value, shape, keep=False)[0]
