"""The kernels of norms, rotations, SwiGLU and softmax rows as a GPU runs them: they compile and keep to registers.

The interpreter takes much that the compiler refuses, and says nothing of speed; this is what a machine without a GPU
can know of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tests.kernels.compiling import Request, compiled, has_compiler
from tuner.kernels.rms_norm import triton as rms_norm
from tuner.kernels.swiglu import triton as swiglu
from tuner.kernels.token_logps import triton as token_logps

FP32, INT = "*fp32:16", "i32:16"


def tensors(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}:16")


def of_norms(kind: str, width: int, *, add: bool, trained: bool) -> list[Request]:
    launch = rms_norm._launch(width)
    warps = launch.pop("num_warps")
    strides = {"x_stride": INT, "rstd_ptr": FP32}
    forward: Mapping[str, str] = {
        **tensors(kind, "x_ptr residual_ptr weight_ptr y_ptr total_ptr"), **strides,
        "residual_stride": INT, "eps": "fp32",
    }  # fmt: skip
    backward: Mapping[str, str] = {
        **tensors(kind, "grad_ptr x_ptr weight_ptr grad_total_ptr grad_x_ptr"), **strides,
        "sums_ptr": FP32, "grad_stride": INT, "grad_total_stride": INT, "rows": "i32",
    }  # fmt: skip
    module = rms_norm.__name__
    return [
        Request(f"{module}:_forward_kernel", forward, {"ADD": add, **launch}, warps),
        Request(f"{module}:_backward_kernel", backward, {"ADD": add, "TRAINED": trained, **launch}, warps),
    ]


def of_swiglu(kind: str) -> list[Request]:
    pairs = {"_forward_kernel": "gate_ptr up_ptr h_ptr"}
    pairs["_backward_kernel"] = "grad_ptr gate_ptr up_ptr grad_gate_ptr grad_up_ptr"
    return [
        Request(f"{swiglu.__name__}:{name}", {**tensors(kind, names), "size": INT}, {"BLOCK": swiglu.BLOCK})
        for name, names in pairs.items()
    ]


def of_rope(kind: str) -> Request:
    """32 heads of 128 numbers, and 8 of keys."""
    signature = {
        **tensors(kind, "q_ptr k_ptr cos_ptr sin_ptr q_out_ptr k_out_ptr"), "q_stride": "1", "k_stride": "1",
        **dict.fromkeys("q_token q_head k_token k_head cos_token sin_token".split(), INT),
    }  # fmt: skip
    blocks = {"HEAD_BLOCK": 32, "KV_HEAD_BLOCK": 8, "HALF_BLOCK": 64}
    return Request(
        "tuner.kernels.rope.triton:_kernel", signature, {"SIGN": 1, "HEADS": 32, "KV_HEADS": 8, "HALF": 64, **blocks}
    )


def of_logits(kind: str, vocabulary: int, **options: Any) -> Request:
    width = -(-vocabulary // token_logps.ALIGNMENT) * token_logps.ALIGNMENT
    signature = {"logits_ptr": f"*{kind}:16", "targets_ptr": "*i64:16", "scale_ptr": FP32, "found_ptr": FP32}
    asked = {"COLLISION": 0, "ENTROPY": 0, "TOP1": 0, "GRAD": False, "SCALED": False, **options}
    return Request(
        f"{token_logps.__name__}:_kernel",
        signature | {"found_stride": "i32"},
        {**asked, "V": vocabulary, "WIDTH": width, "BLOCK": token_logps.LONGEST},
        num_warps=16,
    )


@has_compiler
def test_the_kernels_compile_for_an_h100_and_read_16_bytes_at_once() -> None:
    """With hardly a register spilled: what they wait for is memory, so nothing else may go there."""
    requests = [
        *of_swiglu("bf16"),
        *of_norms("bf16", 4096, add=False, trained=False),
        *of_norms("bf16", 4096, add=True, trained=True),
        *of_norms("bf16", 20_000, add=True, trained=True),
        *of_norms("fp32", 2048, add=True, trained=True),
        of_rope("bf16"),
        of_rope("fp32"),
        of_logits("bf16", 128_256, GRAD=True),
        of_logits("bf16", 32_001, GRAD=True, SCALED=True, COLLISION=1),
        of_logits("fp32", 128_256, TOP1=1, ENTROPY=2),
    ]
    for request, report in zip(requests, compiled(requests), strict=True):
        assert report.stack <= 16, (request, report.registers, report.stack)
        assert re.search(r"ld\.global[.:\w]*\.v4\.b32", report.ptx), request


def test_what_the_launches_ask_for() -> None:
    """The rules that the requests above repeat."""
    assert rms_norm._launch(4096) == {"WIDTH": 4096, "BLOCK": 4096, "num_warps": 8}
    assert rms_norm._launch(5120) == {"WIDTH": 5120, "BLOCK": 8192, "num_warps": 16}
    assert rms_norm._launch(20_000) == {"WIDTH": 20_000, "BLOCK": rms_norm.LONGEST, "num_warps": 16}
    assert rms_norm._launch(7) == {"WIDTH": 7, "BLOCK": 8, "num_warps": 1}
    hidden, weight = torch.empty(5, 4), torch.empty(61, 4)
    assert token_logps._Chunks(hidden, weight)._logits.shape == (5, 64)
