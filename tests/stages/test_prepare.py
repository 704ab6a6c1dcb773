"""What is refused before the data is read, what the data is checked for before a step, and what a run records of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner import recipe as recipes
from tuner.data.templates import TEMPLATES
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


# --- the template of a run ---

DATED = ("data.chat_template=llama3.1", "data.date_string=1 Jan 2025", "train.max_steps=1")


def test_the_template_is_recorded_with_its_options_and_saved_with_the_result(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.run(recipes.load(recipe_file, DATED, stage="sft"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    recorded = manifest["template"]
    assert len(recorded.pop("sha256")) == 64
    assert recorded == {
        "name": "llama3.1",
        "options": {"date_string": "1 Jan 2025", "tools_in_user_message": True, "builtin_tools": None},
        "control_tokens": {},
    }
    assert "llama3.1, with the date 1 Jan 2025; trained: assistant" in capsys.readouterr().out
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template
    assert saved == TEMPLATES["llama3.1"].with_options({"date_string": "1 Jan 2025"}).saved()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.date_string", "2 Jan 2025"),
        ("data.template_options", "{tools_in_user_message: false}"),
        ("data.control_tokens", "{'<|eom_id|>': '<|reserved_special_token_0|>'}"),
        ("data.ghost_attention", "true"),
    ],
)
def test_a_resumed_run_has_the_template_and_the_mask_that_it_began_with(
    recipe_file: Path, tmp_path: Path, key: str, value: str
) -> None:
    sft.run(recipes.load(recipe_file, DATED, stage="sft"))
    assert key in json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]
    overrides = dict(text.split("=", 1) for text in DATED) | {key: value, "train.max_steps": "2"}
    changed = recipes.load(recipe_file, [f"{k}={v}" for k, v in overrides.items()], stage="sft")
    with pytest.raises(RunDirError, match=f"the run differs from the one that was started: .*{re.escape(key)}"):
        sft.run(changed, resume=True)


def test_a_resumed_run_may_do_without_the_cache(recipe_file: Path, tmp_path: Path) -> None:
    sft.run(recipes.load(recipe_file, ["train.max_steps=1"], stage="sft"))
    sft.run(recipes.load(recipe_file, ["train.max_steps=2", "data.cache=false"], stage="sft"), resume=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# --- control tokens that pretraining never saw ---


def forget(model_dir: Path, token: str) -> None:
    """Makes the embedding of a token what it is where nothing has trained it."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(model_dir).vocab[token]] = 0
    model.save_pretrained(model_dir)


@pytest.mark.parametrize("name", ["search", "other"])
def test_optional_control_tokens_that_the_data_holds_must_be_trained(
    recipe_file: Path, tiny_model_dir: Path, chats_file: Path, name: str
) -> None:
    call = {"type": "function", "function": {"name": name, "arguments": {"query": "cats"}}}
    turns = [{"role": "user", "content": "find"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    chats_file.write_text(json.dumps({"messages": turns}) + "\n")
    forget(tiny_model_dir, "<|python_tag|>")
    overrides = ["data.chat_template=llama3.1", "train.max_steps=1", "data.template_options={builtin_tools: [search]}"]
    if name == "other":  # which is called in JSON, without the tag
        sft.run(recipes.load(recipe_file, overrides, stage="sft"))
        return
    with pytest.raises(ModelError, match=r"the embeddings of <\|python_tag\|> were never trained in this base"):
        sft.run(recipes.load(recipe_file, overrides, stage="sft"))
    all_of_it = [*overrides, "adapter.modules_to_save=[embed_tokens, lm_head]"]
    sft.run(recipes.load(recipe_file, all_of_it, stage="sft"))


def test_raw_text_must_not_hold_untrained_control_tokens_either(
    recipe_file: Path, tiny_model_dir: Path, chats_file: Path
) -> None:
    chats_file.write_text(json.dumps({"text": "a<|eot_id|>b"}) + "\n")
    forget(tiny_model_dir, "<|eot_id|>")
    text = ["data.chat_template=auto", "data.format=text", "data.train_on=all", "train.max_steps=1"]
    with pytest.raises(ModelError, match=r"the embeddings of <\|eot_id\|> were never trained"):
        sft.run(recipes.load(recipe_file, [*text, "data.parse_control_tokens=true"], stage="sft"))
    sft.run(recipes.load(recipe_file, text, stage="sft"))
