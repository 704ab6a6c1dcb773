"""A Triton kernel -> what the compiler for an NVIDIA H100 makes of it, on machines without a GPU too.

The wheel of Triton holds the whole compiler, ptxas included. Tests run under the interpreter, which is chosen when
triton is imported; so the compiler runs in a process of its own, which is this file. One process takes a few seconds to
start, so a test asks for all of its kernels at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tool(name: str) -> Path | None:
    found = find_spec("triton")
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / name if found and found.origin else None
    return tool if tool is not None and os.access(tool, os.X_OK) else None


has_compiler = pytest.mark.skipif(
    _tool("ptxas") is None or _tool("cuobjdump") is None, reason="the CUDA assembler of Triton is missing"
)


@dataclass(frozen=True)
class Request:
    """One kernel in one form.

    Args:
        kernel: `module:function`.
        signature: of each argument that is not a constexpr, its type in Triton's spelling: `*bf16`, `fp32`, `i32`; with
            `:16` behind it where it is a multiple of 16, as the addresses of tensors are, and `1` for the integer 1,
            which Triton compiles in.
        constexprs: the others; a dtype is written `tl.bfloat16`, and so is any other name of triton.language.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    capability: int = 90  # an H100 or H200
    enable_fp_fusion: bool = True  # whether a product and a sum may become one instruction, which rounds once


@dataclass(frozen=True)
class Report:
    """What a kernel needs of the machine."""

    registers: int  # a thread; at most 255
    stack: int  # bytes a thread; where registers that did not fit are spilled to
    shared: int  # bytes a program; at most 227 KiB on an H100
    wgmma: bool  # whether it multiplies with the tensor cores' instructions for whole warp groups
    ptx: str


def compiled(requests: Sequence[Request]) -> list[Report]:
    """Compiles every request, in a process where Triton does not interpret."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([asdict(request) for request in requests]),
            env=environment, cwd=cache, capture_output=True, text=True,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return [Report(**report) for report in json.loads(process.stdout)]


def _compile(request: Request) -> Report:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request.kernel.partition(":")
    kernel = getattr(import_module(module), name)
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind, _, multiple = request.signature.get(argument, "constexpr").partition(":")
        if kind in ("constexpr", "1"):
            value = request.constexprs[argument] if kind == "constexpr" else 1
            if isinstance(value, str) and value.startswith("tl."):
                value = getattr(tl, value.removeprefix("tl."))
            constants[(i,)], kind = value, "constexpr"
        elif multiple:
            attributes[(i,)] = [["tt.divisibility", int(multiple)]]
        signature[argument] = kind
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {name: getattr(request, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    result = triton.compile(source, target=GPUTarget("cuda", request.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        used = subprocess.run(
            [str(_tool("cuobjdump")), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (
        int(found[1]) for found in (re.search(rf"{key}:(\d+)", used) for key in ("REG", "STACK")) if found
    )
    ptx = result.asm["ptx"]
    return Report(registers, stack, result.metadata.shared, "wgmma.mma_async" in ptx, ptx)


if __name__ == "__main__":
    reports = [asdict(_compile(Request(**request))) for request in json.load(sys.stdin)]
    json.dump(reports, sys.stdout)
