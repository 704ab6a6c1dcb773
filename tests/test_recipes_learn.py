"""The chat recipes that ship, as a user runs them: the base cannot answer, the tuned model can, and stops by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "least"), [("chat", 0.90), ("chat-qlora", 0.85), ("chat-full", 0.85)])
def test_a_chat_recipe_teaches_the_base_to_answer(recipe: str, least: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuner", "sft", f"recipes/{recipe}.yaml", f"train.output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    assert summary["before"]["exact_match"] <= 0.10
    assert summary["after"]["exact_match"] >= least, done.stdout
    assert summary["after"]["stopped"] == 1.0
