"""4-bit weights of every backend against bitsandbytes, bit for bit, and against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compiling import Request, compiled, has_compiler
from tuner.kernels.dequantize_nf4 import reference
from tuner.kernels.dequantize_nf4 import triton as fused
from tuner.kernels.dequantize_nf4.reference import Nested

bnb: Any = pytest.importorskip("bitsandbytes.functional")

backends = pytest.mark.parametrize("backend", [reference, fused], ids=["reference", "triton"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(48, 128), (1, 64), (3, 50), (3, 5), (130, 130), (8, 2050)]


def packed(shape: tuple[int, int], dtype: torch.dtype, quant_type: str, nested: bool, blocksize: int = 64) -> Any:
    """(bytes, state) of bitsandbytes for a random weight whose blocks differ in size."""
    g = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g).mul(6).sub(4).exp()
    return bnb.quantize_4bit(
        weight.to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )  # fmt: skip


def ours(backend: ModuleType, data: Tensor, state: Any, **options: Any) -> Tensor:
    inner = state.state2
    nested = Nested(inner.code, inner.absmax, state.offset, inner.blocksize) if state.nested else None
    settings = {"blocksize": state.blocksize, "shape": tuple(state.shape), "dtype": state.dtype, "nested": nested}
    result: Tensor = backend.dequantize_nf4(data, state.absmax, state.code, **(settings | options))
    return result


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_bits_are_those_of_bitsandbytes(
    backend: ModuleType, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        data, state = packed(shape, dtype, quant_type, nested)
        found = ours(backend, data, state)
        assert found.dtype == dtype and found.shape == shape
        assert torch.equal(found, bnb.dequantize_4bit(data, state)), shape


@backends
@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_blocks(backend: ModuleType, blocksize: int) -> None:
    data, state = packed((40, 300), torch.float32, "nf4", True, blocksize)
    assert torch.equal(ours(backend, data, state), bnb.dequantize_4bit(data, state))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_rounded_once(backend: ModuleType, dtype: torch.dtype) -> None:
    """Of code x scale in float64 half a unit in the last place is lost, beside the fp32 product's own rounding."""
    data, state = packed((6, 128), dtype, "nf4", False)
    codes = torch.stack([data.flatten() >> 4, data.flatten() & 15], dim=-1).flatten().long()
    exact = state.code.double()[codes].view(-1, 64) * state.absmax.double()[:, None]
    allowed = (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps) * exact.abs()
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((ours(backend, data, state).double().view(-1, 64) - exact).abs() <= allowed + tiny).all()


@backends
def test_what_is_handed_in_is_filled_and_given_back(backend: ModuleType) -> None:
    data, state = packed((7, 66), torch.bfloat16, "nf4", True)
    buffer = torch.full((500,), float("nan"), dtype=torch.bfloat16)
    out = buffer[: 7 * 66].view(7, 66)
    found = ours(backend, data, state, out=out)
    assert found.data_ptr() == buffer.data_ptr()
    assert torch.equal(out, bnb.dequantize_4bit(data, state)) and buffer[7 * 66 :].isnan().all()


@pytest.mark.parametrize("mutant", ["halves", "offset", "scale"])
def test_mutants(mutant: str) -> None:
    data, state = packed((48, 128), torch.float32, "nf4", True)
    wanted = ours(fused, data, state)
    if mutant == "halves":
        data = data >> 4 | data << 4
    elif mutant == "offset":
        state.offset = state.offset * 0
    else:
        state.absmax = state.absmax.roll(1)
    for backend in (reference, fused):
        assert not torch.equal(ours(backend, data, state), wanted)


@has_compiler
def test_the_kernel_compiles_for_a_gpu_without_fused_multiply_adds() -> None:
    pointers = {"packed": "*u8", "code": "*fp32", "nested_code": "*fp32", "nested_scale": "*fp32", "offset": "*fp32"}
    signature = {f"{name}_ptr": f"{kind}:16" for name, kind in pointers.items()}
    requests = [
        Request(
            f"{fused.__name__}:_dequantize_kernel",
            signature | {"scale_ptr": "*u8:16" if nested else "*fp32:16", "out_ptr": "*bf16:16", "size": "i32:16"},
            {"BLOCKSIZE": 64, "NESTED": nested, "NESTED_BLOCKSIZE": 256, "BLOCK": fused.BLOCK},
            num_warps=fused.NUM_WARPS,
            enable_fp_fusion=fusion,
        )
        for nested, fusion in ((False, False), (True, False), (True, True))
    ]
    *reports, otherwise = compiled(requests)
    assert "fma.rn.f32" in otherwise.ptx, "what the option is for"
    for report in reports:
        assert "fma.rn.f32" not in report.ptx
        assert report.stack == 0 and report.registers <= 128
        assert report.ptx.count("st.global.v4") >= 4, "16 bytes at once"
