"""What is refused before the data is read: the output directory, the checkpoint, an adapter to go on with, trackers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import recipe as recipes
from tuner.errors import ModelError, RecipeError, RunDirError, UserError
from tuner.stages import prepare, sft


def refused(recipe_file: Path, *overrides: str, overwrite: bool = False) -> UserError:
    """The error of a run whose data must not even be looked at."""
    before = sorted(recipe_file.parent.rglob("*"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(prepare, "load_split", lambda *a, **k: pytest.fail("the data was read"))
        sft.run(recipes.load(recipe_file, overrides, stage="sft"), overwrite=overwrite)
    assert sorted(recipe_file.parent.rglob("*")) == before
    return caught.value


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda m: (m / "config.json").write_text("[]"), "config.json cannot be read"),
        (edit_config(num_attention_heads=0), "config.json cannot be read"),
        (edit_config(num_attention_heads=5), "config.json cannot be read: .*not a multiple of the number of attention"),
        (edit_config(hidden_size="x"), "config.json cannot be read: .*expected int, got str"),
        (edit_config(model_type="gpt2"), "is a 'gpt2' model"),
        (lambda m: (m / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda m: (m / "model.safetensors").write_bytes(b"1234"), r"model.safetensors \(4 bytes\) is truncated"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(
    recipe_file: Path, tiny_model_dir: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(tiny_model_dir)
    error = refused(recipe_file)
    assert isinstance(error, ModelError) and re.search(expected, str(error))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 128, "head_dim": 16}, "lm_head.weight has [320, 64] instead of [320, 128]"),
        ({"hidden_act": "sillu"}, "'sillu' is unknown"),
        ({"num_hidden_layers": 3}, "missing keys in the weights: model.layers.2.input_layernorm.weight"),
    ],
)
def test_weights_that_do_not_fit_their_config(
    recipe_file: Path, tiny_model_dir: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    edit_config(**change)(tiny_model_dir)
    with pytest.raises(ModelError) as caught:
        sft.run(recipes.load(recipe_file, stage="sft"))
    assert expected in str(caught.value) and not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.train.metrics.get_available_trackers", list)
    error = refused(recipe_file, "log.report_to=[wandb]")
    assert isinstance(error, RecipeError) and "the library of 'wandb' is not installed" in str(error)


def test_an_adapter_that_is_none(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    text = recipe_file.read_text().replace("{r: 4, lora_alpha: 8}", f"{{path: {tmp_path}/adapter}}")
    recipe_file.write_text(text)
    assert "holds no adapter_config.json" in str(refused(recipe_file))


def test_an_occupied_directory_and_one_that_the_run_reads(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    assert "no readable manifest.json" in str(refused(recipe_file, overwrite=True))
    (tmp_path / "run" / "precious").unlink()
    sft.run(recipes.load(recipe_file, ["train.max_steps=1"], stage="sft"))
    assert isinstance(refused(recipe_file), RunDirError)
    text = recipe_file.read_text().replace("{r: 4, lora_alpha: 8}", f"{{path: {tmp_path}/run}}")
    recipe_file.write_text(text)
    assert "adapter.path:" in str(refused(recipe_file, overwrite=True))


def test_a_checkpoint_of_another_shape_is_named(recipe_file: Path, tmp_path: Path) -> None:
    sft.run(recipes.load(recipe_file, ["train.max_steps=1"], stage="sft"))
    wider = recipes.load(recipe_file, ["train.max_steps=2", "adapter.r=8"], stage="sft")
    with pytest.raises(RunDirError, match=r"does not fit this model: .* is \[4, 64\] there and \[8, 64\] here"):
        sft.run(wider, resume=True, allow_drift=["adapter.r"])
