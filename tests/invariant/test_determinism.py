"""Invariant 12: the same recipe and seed on the same machine give the same bytes, in any process and directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import recipe as recipes
from tuner.stages import machine, prepare, sft

REPOSITORY = Path(__file__).resolve().parents[2]
WALL_CLOCK = ("seconds", "tokens_per_second", "memory_bytes")
OVERRIDES = ["adapter.lora_dropout=0.2", "data.eval=0.15", "eval.steps=2"]


def assert_same(a: Path, b: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes(), name

    def rows(run: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]

    assert rows(a) == rows(b)


def test_new_processes_give_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    processes = []
    for number, hash_seed in enumerate(("1", "2")):
        cwd = tmp_path / f"cwd{number}"
        cwd.mkdir()
        command = [sys.executable, "-m", "tuner", "sft", str(recipe_file), *OVERRIDES, "train.output_dir=run"]
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        processes.append(subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
    assert_same(tmp_path / "cwd0" / "run", tmp_path / "cwd1" / "run")
    sft.run(recipes.load(recipe_file, [*OVERRIDES, f"train.output_dir={tmp_path}/here"]))
    assert_same(tmp_path / "cwd0" / "run", tmp_path / "here")


def test_another_seed_is_another_run(recipe_file: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        sft.run(recipes.load(recipe_file, [*OVERRIDES, f"train.seed={seed}", f"train.output_dir={tmp_path}/{seed}"]))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "0", tmp_path / "1")


def test_mutant_a_run_that_is_not_seeded(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, prepare):
        monkeypatch.setattr(module, "seed_everything", lambda seed: None)
    for number in (0, 1):
        torch.manual_seed(number)
        sft.run(recipes.load(recipe_file, [*OVERRIDES, f"train.output_dir={tmp_path}/{number}"]))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "0", tmp_path / "1")
