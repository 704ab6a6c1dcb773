"""Root mean square normalisation, one pass over memory each way (arXiv:1910.07467 eq. 4).

    y = w * n,   n = x / rms(x),   rms(x) = sqrt(mean(x^2) + eps)
    d x = (g w - n mean(g w n)) / rms(x),   d w = sum over rows of g n

A program owns whole rows, so a row is read once; of the forward only 1 / rms is kept. The rounding is that of the
reference: n meets the weight in the dtype of x. A trained weight gets its gradient from a fixed number of programs,
each of which adds up the rows dealt to it, in order; their sums are added in order too. So it is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.kernels.portable import rounded
from tuner.kernels.rms_norm.node import AddRMSNorm, RMSNorm

LONGEST = 16384  # numbers of a row that a program holds in registers; of a longer row it reads part after part, twice
PROGRAMS = 512  # that share the rows where the weight is trained: a few for each multiprocessor of an H100


def _launch(width: int) -> dict[str, int]:
    """How a row of `width` is laid out: 512 numbers a warp are two loads of 16 bytes a thread in bf16."""
    block = min(triton.next_power_of_2(width), LONGEST)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr,
    x_stride, residual_stride, eps,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            residual = tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0)
            total = rounded(x + residual.to(tl.float32), dtype)
            tl.store(total_ptr + row * WIDTH + at, total, mask=inside)
            x = total.to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 0) * (1.0 / WIDTH) + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in tl.static_range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        if WIDTH > BLOCK:
            x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                residual = tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0)
                x = rounded(x + residual.to(tl.float32), dtype).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = rounded(x * rstd, dtype).to(tl.float32) * weight
        tl.store(y_ptr + row * WIDTH + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, grad_total_ptr, grad_x_ptr, sums_ptr,
    grad_stride, x_stride, grad_total_stride, rows,
    ADD: tl.constexpr, TRAINED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(program, rows, programs):
        row = tl.full([], i, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros([BLOCK], tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32) * rstd
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            products += grad * weight * normed
            if TRAINED and WIDTH > BLOCK:  # sums of several parts lie in memory
                so_far = tl.load(sums_ptr + program * WIDTH + at, mask=inside, other=0.0)
                tl.store(sums_ptr + program * WIDTH + at, so_far + grad * normed, mask=inside)
                tl.debug_barrier()  # before another thread reads them for the next row
        mean = tl.sum(products, 0) * (1.0 / WIDTH)
        for start in tl.static_range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            if WIDTH > BLOCK:
                grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
                normed = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32) * rstd
                weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            elif TRAINED:
                sums += grad * normed
            grad_x = (grad * weight - normed * mean) * rstd
            if ADD:
                grad_x += tl.load(grad_total_ptr + row * grad_total_stride + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + row * WIDTH + at, rounded(grad_x, grad_x_ptr.dtype.element_ty), mask=inside)
    if TRAINED and WIDTH <= BLOCK:
        at = tl.arange(0, BLOCK)
        tl.store(sums_ptr + program * WIDTH + at, sums, mask=at < WIDTH)


def _rows(x: Tensor) -> Tensor:
    """`[..., H]` -> `[rows, H]`, a view where each row is one piece of memory."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, 1 / rms `[rows]` in fp32); x itself without a residual."""
    flat, weight = _rows(x), weight.contiguous()
    total = x
    if residual is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y = torch.empty(x.shape, dtype=torch.promote_types(total.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    added = flat if residual is None else _rows(residual)
    _forward_kernel[(flat.shape[0],)](
        flat, added, weight, y, total, rstd, flat.stride(0), added.stride(0), eps,
        ADD=residual is not None, **_launch(x.shape[-1]),
    )  # fmt: skip
    return y, total, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_total: Tensor | None, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """(d x with `grad_total` added, in the dtype of x; d weight if it is trained)."""
    flat, g, weight = _rows(x), _rows(grad), weight.contiguous()
    added = g if grad_total is None else _rows(grad_total)
    rows, width = flat.shape
    launch = _launch(width)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = rstd  # of no use where the weight is frozen
    if trained:
        sums = torch.zeros(min(PROGRAMS, rows), width, dtype=torch.float32, device=x.device)
    _backward_kernel[(len(sums),)](
        g, flat, weight, rstd, added, grad_x, sums, g.stride(0), flat.stride(0), added.stride(0), rows,
        ADD=grad_total is not None, TRAINED=trained, **launch,
    )  # fmt: skip
    return grad_x, sums.sum(0).to(weight.dtype) if trained else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[..., H]` and the weight `[H]` -> `[..., H]`, in the wider dtype of the two."""
    return RMSNorm.apply(x, weight, eps, _forward, _backward)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), written in one pass; the backward adds their two gradients up inside."""
    return AddRMSNorm.apply(x, residual, weight, eps, _forward, _backward)
