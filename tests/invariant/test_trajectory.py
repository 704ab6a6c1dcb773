"""A run with fused modules learns what a run with the stock ones learns, step by step: 200 steps, in fp32 and bf16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tuner import recipe as recipes
from tuner.model.load import resolve_dtype
from tuner.stages import prepare, sft

ROOT = Path(__file__).parents[2]
STEPS = 200
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
backends = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("triton", marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="200 steps of Triton need a GPU")),
    ],
)
pytestmark = pytest.mark.slow


def losses(directory: Path, dtype: str, attention: str, backend: str = "reference") -> np.ndarray:
    """The loss of every step of a short run on the bundled model, at a rate that does not amplify rounding."""
    settings = (
        f"train.output_dir={directory}",
        f"train.max_steps={STEPS}",
        "train.batch_size=4",
        "train.learning_rate=3e-4",
        "data.cache=false",
        "eval.questions=null",
        "data.eval=null",
        "log.logging_steps=1",
        f"model.dtype={dtype}",
        f"model.attn_implementation={attention}",
        f"model.kernels={backend}",
    )
    sft.run(recipes.load(ROOT / "recipes" / "chat.yaml", settings, stage="sft"))
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = np.array([json.loads(line)["loss"] for line in lines])
    assert len(values) == STEPS
    return values


def difference(tmp_path: Path, dtype: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Fused minus stock: transformers' and peft's own modules, and one dense mask over the row."""
    fused = losses(tmp_path / "fused", dtype, "tuner_varlen" if backend == "reference" else backend, backend)
    monkeypatch.setattr(prepare, "fuse", lambda lm, functions, **_: {})
    stock = losses(tmp_path / "stock", dtype, "sdpa")
    assert stock[0] - stock[-20:].mean() > 3.0, "little was learned, so little was compared"
    return fused - stock


@backends
def test_fp32(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(difference(tmp_path, "float32", backend, monkeypatch)).mean() < 1e-5


@pytest.mark.skipif(resolve_dtype("auto", DEVICE) != torch.bfloat16, reason="this machine does not compute in bfloat16")
@backends
def test_bf16(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = difference(tmp_path, "bfloat16", backend, monkeypatch)
    assert abs(found.mean()) < 1e-3
    # no one-sided drift: neither run is below the other all the time, nor farther away at the end
    assert 0.2 < (found > 0).mean() < 0.8
    assert abs(found[-50:].mean()) < 1e-3
