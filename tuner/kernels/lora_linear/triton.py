"""LoRA linears with the work on skinny matrices in Triton; `node.py` has the equations.

The matmuls with the base stay the library's. What is only as wide as the ranks is bound by memory, so here each large
matrix is read once: a gradient g gives g B and g^T z in one pass, an input gives its product with u, and h is made from
gate and up where it is read. Sums over rows or columns that are split between programs are written in parts, which are
added up in order: no atomics, the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.lora_linear import Adapter, Base, node
from tuner.kernels.portable import dot, rounded
from tuner.kernels.swiglu import triton as swiglu

BLOCK = 2048  # numbers of a program that copies
ROWS = 64  # of a tile
WIDEST = 128  # columns of a skinny matrix in a tile; what is wider goes in several passes
NARROW = 32  # columns up to which the parts of g B that one pass writes cost less than a second pass over g
SUMS = 8192  # of a program, in registers: columns of a tile x those of the skinny matrix
NUM_WARPS = 8
NUM_STAGES = 2  # tiles on their way: 128 KiB of shared memory at the widest
PROGRAMS = 528  # that share a large matrix: four for each multiprocessor of an H100
GROUP = 3  # adapters that one launch lays out


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5", "s0", "s1", "s2", "s3", "s4", "s5"])
def _lay_out_kernel(
    p0, p1, p2, p3, p4, p5, n0, n1, n2, n3, n4, n5, s0, s1, s2, s3, s4, s5, out_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = s0 p0, s1 p1, ... one after the other; n numbers each."""
    which = tl.program_id(1)
    source, size, scale, before = p0, n0, s0, n0 - n0
    if which == 1:
        source, size, scale, before = p1, n1, s1, n0
    if which == 2:
        source, size, scale, before = p2, n2, s2, n0 + n1
    if which == 3:
        source, size, scale, before = p3, n3, s3, n0 + n1 + n2
    if which == 4:
        source, size, scale, before = p4, n4, s4, n0 + n1 + n2 + n3
    if which == 5:
        source, size, scale, before = p5, n5, s5, n0 + n1 + n2 + n3 + n4
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(source + at, mask=inside).to(tl.float32) * scale
    tl.store(out_ptr + before + at, rounded(x, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tiles_kernel(
    x_ptr, up_ptr, skinny_ptr, b_ptr, outer_ptr, through_ptr,
    rows, columns, rows_each, x_stride, skinny_stride, b_stride, outer_stride, outer_rank_stride,
    RANK: tl.constexpr, PADDED: tl.constexpr, GATED: tl.constexpr, THROUGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of x [N, C], or of the h of a gate and an up: a part of skinny^T x, and with THROUGH one of x B."""
    split = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, PADDED)
    b_tile = tl.zeros([COLUMNS, PADDED], x_ptr.dtype.element_ty)
    if THROUGH:
        b_tile = tl.load(
            b_ptr + c[:, None] * b_stride + r[None, :], mask=(c[:, None] < columns) & (r[None, :] < RANK), other=0.0
        )
    total = tl.zeros([COLUMNS, PADDED], tl.float32)
    first = split * rows_each
    for start in range(first, min(first + rows_each, rows), ROWS):
        n = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (n[:, None] < rows) & (c[None, :] < columns)
        x = tl.load(x_ptr + n[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
        if GATED:
            up = tl.load(up_ptr + n[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
            gate = x.to(tl.float32)
            x = rounded(gate / (1 + tl.exp(-gate)) * up, x_ptr.dtype.element_ty)
        held = (n[:, None] < rows) & (r[None, :] < RANK)
        skinny = tl.load(skinny_ptr + n[:, None] * skinny_stride + r[None, :], mask=held, other=0.0)
        total = dot(tl.trans(x), skinny, total)
        if THROUGH:
            through = dot(x, b_tile, tl.zeros([ROWS, PADDED], tl.float32))
            part = (tl.program_id(0).to(tl.int64) * rows + n) * RANK
            tl.store(through_ptr + part[:, None] + r[None, :], through, mask=held)
    part = split.to(tl.int64) * columns * RANK
    to = outer_ptr + part + c[:, None] * outer_stride + r[None, :] * outer_rank_stride
    tl.store(to, total, mask=(c[:, None] < columns) & (r[None, :] < RANK))


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, parts, size, WIDTH: tl.constexpr, out_stride, BLOCK: tl.constexpr):
    """out [size / WIDTH, WIDTH] = the sum of `parts` matrices, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    here = parts_ptr + at
    for _ in range(parts):
        total += tl.load(here, mask=inside, other=0.0)
        here += size
    to = out_ptr + at // WIDTH * out_stride + at % WIDTH
    tl.store(to, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def _lay_out(adapters: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    a, b = adapters[::2], adapters[1::2]
    if len(a) > GROUP:
        head, tail = _lay_out(adapters[: 2 * GROUP], scalings[:GROUP], dtype), adapters[2 * GROUP :]
        rest = _lay_out(tail, scalings[GROUP:], dtype)
        return torch.cat([head[0], rest[0]]), head[1] + rest[1]
    sources = [m.contiguous() for m in (*a, *b)]
    sizes, missing = [m.numel() for m in sources], 2 * GROUP - len(sources)
    laid = torch.empty(sum(sizes), dtype=dtype, device=sources[0].device)
    _lay_out_kernel[(triton.cdiv(max(sizes), BLOCK), len(sources))](
        *sources, *sources[:1] * missing, *sizes, *[0] * missing, *scalings, *[1.0] * (len(b) + missing), laid, BLOCK
    )
    pieces = laid.split([sum(sizes[: len(a)]), *sizes[len(a) :]])
    return pieces[0].view(-1, a[0].shape[1]), [piece.view(m.shape) for piece, m in zip(pieces[1:], b, strict=True)]


def _add_to_base(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    # The small product first, and the large one onto it: its epilogue adds, which saves reading and writing y once
    # more, and y is rounded at its full size only once.
    y = z @ b.T if bias is None else torch.addmm(bias, z, b.T)
    return y.addmm_(x, weight.T)


def _sum(parts: Tensor, out: Tensor) -> None:
    """`[P, n, width]` -> `out` `[n, width]`, whose rows may lie apart."""
    size, width = parts[0].numel(), parts.shape[2]
    _sum_kernel[(triton.cdiv(size, BLOCK),)](parts, out, len(parts), size, width, out.stride(0), BLOCK)


def tile(rank: int, element_size: int, gated: bool) -> tuple[int, int]:
    """Columns of the skinny matrix and of the large one in a tile."""
    padded = max(16, triton.next_power_of_2(rank))
    if element_size == 4:
        return padded, SUMS // padded // 4
    return padded, max(64, SUMS // padded // (2 if gated else 1))  # tensor cores take 64 at once


def _tiles(
    x: Tensor, skinny: Tensor, *, up: Tensor | None = None, b: Tensor | None = None, by_rank: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Parts of skinny^T x `[P, C, r]`, or `[P, r, C]` if `by_rank`, and of x B `[Q, N, r]`."""
    if up is not None:
        x, up = x.contiguous(), up.contiguous()
    elif x.stride(1) != 1:
        x = x.contiguous()
    (rows, columns), rank = x.shape, skinny.shape[1]
    padded, block = tile(rank, x.element_size(), gated=up is not None)
    across = triton.cdiv(columns, block)
    splits = min(triton.cdiv(rows, ROWS), max(1, PROGRAMS // across))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), ROWS) * ROWS
    splits = triton.cdiv(rows, rows_each)
    outer = x.new_empty(splits, *((rank, columns) if by_rank else (columns, rank)), dtype=torch.float32)
    through = None if b is None else x.new_empty(across, rows, rank, dtype=torch.float32)
    _tiles_kernel[(across, splits)](
        x, x if up is None else up, skinny, x if b is None else b, outer, outer if through is None else through,
        rows, columns, rows_each, x.stride(0), skinny.stride(0), 0 if b is None else b.stride(0),
        *((1, columns) if by_rank else (rank, 1)),
        RANK=rank, PADDED=padded, GATED=up is not None, THROUGH=b is not None, ROWS=ROWS, COLUMNS=block,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return outer, through


def _by_width(rank: int) -> list[tuple[int, int]]:
    return [(start, min(start + WIDEST, rank)) for start in range(0, rank, WIDEST)]


def _through_b(grads: Sequence[Tensor], z: Tensor, b16: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    u, grads_b, before = torch.empty_like(z), [], 0
    for g, b in zip(grads, b16, strict=True):
        rank = b.shape[1]
        if rank > NARROW:
            own = slice(before, before + rank)
            torch.mm(g, b, out=u[:, own])
            grads_b.append((g.T @ z[:, own]).float())
            before += rank
            continue
        grad_b = b.new_empty(b.shape, dtype=torch.float32)
        for start, stop in _by_width(b.shape[1]):
            columns = slice(before + start, before + stop)
            outer, through = _tiles(g, z[:, columns], b=b[:, start:stop])
            assert through is not None
            _sum(through, u[:, columns])
            _sum(outer, grad_b[:, start:stop])
        grads_b.append(grad_b)
        before += b.shape[1]
    return u, grads_b


def _outer(u: Tensor, x: Tensor, up: Tensor | None = None) -> Tensor:
    out = x.new_empty(u.shape[1], x.shape[1], dtype=torch.float32)
    for start, stop in _by_width(u.shape[1]):
        parts, _ = _tiles(x, u[:, start:stop], up=up, by_rank=True)
        _sum(parts, out[start:stop])
    return out


PARTS = node.Parts(
    lay_out=_lay_out,
    add_to_base=_add_to_base,
    through_b=_through_b,
    outer=_outer,
    outer_gated=lambda u, gate, up: _outer(u, gate, up),
    gate=swiglu.forward,
    gate_backward=swiglu.backward,
)


def lora_linears(x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter]) -> tuple[Tensor, ...]:
    """The outputs `[..., out]` of linears that share the input x `[..., in]`, as one node."""
    return node.LoraLinears.apply(x, PARTS, node.group(bases, adapters), *node.masters(adapters))


def swiglu_lora_linear(gate: Tensor, up: Tensor, base: Base, adapter: Adapter, *, wanted: bool = True) -> Tensor:
    """`reference.swiglu_lora_linear`; the backward reads gate and up to make h where it meets the adapter."""
    return node.SwigluLoraLinear.apply(gate, up, PARTS, node.group([base], [adapter]), wanted, *node.masters([adapter]))
