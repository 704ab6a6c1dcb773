"""What a run decides at its start, of its machine and of the config of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner import recipe as recipes
from tuner.errors import RecipeError
from tuner.stages.machine import find_machine


def test_a_run_asks_with_the_config_of_its_model(recipe_file: Path, tiny_model_dir: Path) -> None:
    file = tiny_model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.1}))
    asked = recipes.load(recipe_file, ["stage=sft", "model.attn_implementation=triton"])
    with pytest.raises(RecipeError, match="triton cannot run: .* sets attention_dropout: 0.1"):
        find_machine(asked, resume=False)
