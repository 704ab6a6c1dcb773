"""4-bit weights in the buffer that they share: whose bits, whose memory, and what merges get."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import kernels
from tuner.errors import RecipeError
from tuner.kernels.dequantize_nf4 import triton as dequantize_nf4
from tuner.model import quantize
from tuner.model.load import check_checkpoint
from tuner.recipe import ModelSection

bnb = pytest.importorskip("bitsandbytes")

REFERENCE = kernels.load("reference")
TRITON = replace(REFERENCE, backend="triton", dequantize_nf4=dequantize_nf4.dequantize_nf4)


def linear(out: int, width: int, quant_type: str = "nf4", double: bool = True, blocksize: int = 64) -> Any:
    made = bnb.nn.Linear4bit(width, out, bias=False, quant_type=quant_type, compress_statistics=double)
    torch.manual_seed(out)
    weight = torch.randn(out, width)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, compress_statistics=double, blocksize=blocksize
    )
    return made.to("cpu")


@pytest.fixture(autouse=True)
def no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_workspaces", {})


@pytest.mark.parametrize("functions", [REFERENCE, TRITON], ids=["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_the_bits_are_the_librarys(
    functions: kernels.Kernels, dtype: torch.dtype, quant_type: str, double: bool
) -> None:
    for out, width, blocksize in ((48, 128, 64), (9, 40, 64), (6, 15, 64), (64, 128, 4096)):
        module = linear(out, width, quant_type, double, blocksize)
        assert module.weight.quant_state.blocksize == blocksize
        found = quantize.borrow(module, dtype, functions)
        assert found.dtype == dtype and torch.equal(found, quantize.dequantize(module, dtype))


@pytest.mark.parametrize("functions", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_one_buffer_serves_all_and_grows(functions: kernels.Kernels) -> None:
    small, other, large = linear(8, 64), linear(16, 64), linear(32, 64)

    def place(module: Any, dtype: torch.dtype = torch.bfloat16) -> int:
        return quantize.borrow(module, dtype, functions).data_ptr()

    place(small)
    grown = place(large)
    assert {place(m) for m in (small, other, large)} == {grown}
    assert place(small, torch.float32) != grown
    assert sorted(buffer.numel() for buffer in quantize._workspaces.values()) == [8 * 64, 32 * 64]


def test_what_merges_get_is_their_own() -> None:
    first, second = linear(8, 64), linear(16, 64)
    quantize.borrow(second, torch.float32, REFERENCE)
    own = quantize.dequantize(first, torch.float32)
    kept = own.clone()
    quantize.borrow(second, torch.float32, REFERENCE)
    assert torch.equal(own, kept)
    assert own.untyped_storage().data_ptr() not in {
        buffer.untyped_storage().data_ptr() for buffer in quantize._workspaces.values()
    }


def test_a_buffer_made_while_sampling_can_be_trained_with() -> None:
    module = linear(8, 64)
    with torch.inference_mode():
        quantize.borrow(module, torch.float32, REFERENCE)
    x = torch.randn(2, 64, requires_grad=True)
    weight = quantize.borrow(module, torch.float32, REFERENCE)
    (x @ weight.T).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("said", ["installed and cannot be imported (undefined symbol)", "not installed"])
def test_without_bitsandbytes_four_bits_are_refused_at_once(
    said: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MISSING", said)
    assert check_checkpoint(ModelSection(name_or_path=str(tiny_model_dir)))
    asked = ModelSection(name_or_path=str(tiny_model_dir), load_in_4bit=True)
    with pytest.raises(RecipeError, match=f"model.load_in_4bit: true needs .* which is {re.escape(said)}; .*install"):
        check_checkpoint(asked)
    with pytest.raises(RecipeError, match=f"train.optim: adamw_8bit needs .* which is {re.escape(said)}"):
        quantize.check_optimizer("adamw_8bit", torch.device("cuda"))


def test_a_bitsandbytes_that_cannot_be_imported_counts_as_absent(tmp_path: Path) -> None:
    """In a process of its own: peft, which looks for the package and then imports it, loads no less."""
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('undefined symbol')")
    program = (
        "from tuner.model import fuse, quantize; from peft.import_utils import is_bnb_available; "
        "print(quantize.MISSING, quantize.Linear4bit, is_bnb_available())"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(quantize.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "installed and cannot be imported (undefined symbol) None False\n", done.stderr
