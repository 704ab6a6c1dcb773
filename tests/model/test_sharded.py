"""Fused modules under FSDP2: two ranks that each hold half of the weights give the gradients of one that holds all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.model import sharded

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("kind", "recompute"), [("lora", "everything"), ("full", "selective")])
def test_gradients_of_two_ranks_are_those_of_one(kind: str, recompute: str, tmp_path: Path) -> None:
    output = tmp_path / "gradients.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(sharded.__file__)), str(output), kind, recompute],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    policy = sharded.policy_of(kind, recompute)
    wanted = sharded.step(policy, sharded.samples(), 1.0)
    found = load_file(output)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * max(1.0, float(gradient.norm())), name
