"""What a run computes with is chosen once and said; what was asked for by name is used or refused."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from tuner import kernels
from tuner.errors import RecipeError
from tuner.kernels import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's machine, where Triton does not interpret."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)


@pytest.mark.usefixtures("compiled")
def test_auto_says_what_it_chose_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.resolve_backend("auto", CPU) == ("reference", "plain torch is the quick path of a CPU")
    assert kernels.resolve_backend("auto", CUDA)[0] == "triton"
    assert kernels.resolve_attention("auto", CPU, torch.bfloat16, "reference")[0] == "tuner_varlen"
    assert kernels.resolve_attention("auto", CUDA, torch.bfloat16, "triton")[0] == "triton"
    assert kernels.resolve_attention("auto", CUDA, torch.bfloat16, "reference")[0] == "tuner_varlen"
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    backend, why = kernels.resolve_backend("auto", CUDA)
    assert backend == "reference" and "pip install 'tuner[kernels]'" in why


@pytest.mark.usefixtures("compiled")
def test_without_triton_a_gpu_takes_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "why_no_package", lambda package: f"the package {package} is not installed")
    name, why = kernels.resolve_attention("auto", CUDA, torch.bfloat16, "reference")
    assert name == "varlen" and "triton cannot be used" in why
    assert kernels.resolve_attention("auto", CUDA, torch.float32, "reference")[0] == "tuner_varlen"
    assert kernels.resolve_attention("auto", CPU, torch.bfloat16, "reference")[0] == "tuner_varlen"


@pytest.mark.usefixtures("compiled")
def test_an_explicit_choice_is_never_replaced() -> None:
    assert kernels.resolve_backend("reference", CUDA)[0] == "reference"
    assert kernels.resolve_attention("sdpa", CPU, torch.float32, "reference")[0] == "sdpa"
    with pytest.raises(RecipeError, match="model.kernels: 'cuda-magic' is unknown; use 'auto' or one of: reference"):
        kernels.resolve_backend("cuda-magic", CPU)
    with pytest.raises(RecipeError, match="model.kernels: triton cannot run: there is no GPU here.*kernels: auto"):
        kernels.resolve_backend("triton", CPU)


@pytest.mark.usefixtures("compiled")
def test_without_a_gpu_no_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="there is no GPU here"):
        kernels.resolve_backend("triton", CPU)
    for name in attention.PACKAGES:
        with pytest.raises(RecipeError, match=f"{name} cannot run: there is no GPU here"):
            kernels.resolve_attention(name, CPU, torch.bfloat16, "reference")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("package", "name"), [(package, name) for name, package in attention.PACKAGES.items()])
def test_a_package_that_is_there_and_broken(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    said = rf"the package {package} is installed and cannot be imported \(undefined symbol: _ZN3c10\); .*install"
    with pytest.raises(RecipeError, match=f"model.attn_implementation: {name} cannot run: {said}.*: auto"):
        kernels.resolve_attention(name, CUDA, torch.bfloat16, "reference")
    if package == "triton":
        backend, why = kernels.resolve_backend("auto", CUDA)
        assert backend == "reference" and re.search(said, why)
        with pytest.raises(RecipeError, match=f"model.kernels: triton cannot run: {said}.*kernels: auto"):
            kernels.resolve_backend("triton", CUDA)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("triton", CPU, torch.bfloat16, "triton cannot run: there is no GPU here, .*attn_implementation: auto"),
        ("varlen", CPU, torch.bfloat16, "varlen cannot run: there is no GPU here"),
        ("varlen", CUDA, torch.float32, ".* computes in bfloat16 or float16, and this run in float32"),
        ("flash_attention_2", CUDA, torch.bfloat16, ".*the package flash_attn is not installed"),
        ("flash_attention_3", CUDA, torch.bfloat16, ".*the package flash_attn_interface is not installed"),
    ],
)
def test_attention_that_cannot_run_says_what_to_do(
    name: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(RecipeError, match=f"model.attn_implementation: {message}"):
        kernels.resolve_attention(name, device, dtype, "reference")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"head_dim": 256}, "its heads have up to 128 dimensions, and those of this model 256"),
        ({"dropout": 0.1}, "it has no dropout of attention weights, .*config.json sets attention_dropout: 0.1"),
    ],
)
def test_a_model_that_the_kernel_cannot_serve(model: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=f"model.attn_implementation: triton cannot run: {message}"):
        kernels.resolve_attention("triton", CUDA, torch.bfloat16, "triton", **model)
    name, why = kernels.resolve_attention("auto", CUDA, torch.bfloat16, "triton", **model)
    assert name == "tuner_varlen" and re.search(message, why)
    assert kernels.resolve_attention("tuner_varlen", CUDA, torch.bfloat16, "triton", **model)[0] == "tuner_varlen"


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_every_backend_has_every_function(backend: str) -> None:
    functions = kernels.load(backend)
    homes = {op: getattr(functions, op).__module__ for op in kernels.OPS}
    assert homes == {op: f"tuner.kernels.{home}.{backend}" for op, home in kernels.OPS.items()}
    assert copy.deepcopy(functions) is functions


def test_every_attention_loads() -> None:
    for name in attention.IMPLEMENTATIONS:
        assert callable(attention.load(name))
