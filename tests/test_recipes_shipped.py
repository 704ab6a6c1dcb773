"""Every recipe that ships: it loads, says how it is used, and states nothing but what is special about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tuner import pipeline as runner
from tuner import recipe as recipes
from tuner.recipe import PREFERENCE, Recipe
from tuner.recipe import pipeline as pipelines
from tuner.recipe.pipeline import TrainStage
from tuner.stages import dpo, reward, sft

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
PIPELINES = [file.stem for file in FILES if pipelines.is_pipeline(file)]
NAMES = [file.stem for file in FILES if file.stem not in PIPELINES]  # recipes of one stage
# What the commands of the issue and the README name.
EXPECTED = {
    "chat",
    "chat-full",
    "chat-qlora",
    "pretrain",
    "llama2-7b-sft",
    "llama3.1-8b-lora",
    "llama3.1-8b-qlora",
    "llama3.2-1b-full",
    "pref",
    "kto",
    "llama3.1-8b-dpo",
    "reward",
    "llama2-7b-reward",
}
STAGES = {"sft": sft.run, "reward": reward.run, "dpo": dpo.run}


def read(name: str) -> Recipe:
    recipe = recipes.load(FOLDER / f"{name}.yaml", find_inputs=False)
    assert recipe.stage in STAGES, "a recipe that ships says its stage"
    return recipe


def test_all_are_there() -> None:
    assert set(NAMES) >= EXPECTED and "align" in PIPELINES


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_writes_to_a_run_of_its_own_name(name: str) -> None:
    assert read(name).train.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", [*NAMES, *PIPELINES])
def test_its_header_says_what_it_does_how_to_run_it_and_on_what(name: str) -> None:
    header = (FOLDER / f"{name}.yaml").read_text().split("version: 1\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    command = "run" if name in PIPELINES else read(name).stage
    assert re.search(rf"^#   .*tuner {command} recipes/{re.escape(name)}\.yaml", header, re.MULTILINE)
    assert "Hardware:" in header


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("chat")])
def test_recipes_on_bundled_data_find_it_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(FOLDER / f"{name}.yaml", stage="sft")
    assert Path(recipe.model.name_or_path).is_dir() and Path(recipe.data.train[0].path).is_file()
    assert recipe.eval.questions is not None and Path(recipe.eval.questions).is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("llama")])
def test_recipes_for_real_models_ask_for_data_and_take_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipes.RecipeError, match=r"data\.train.*'data/my-(chats|pairs)\.jsonl' is not there"):
        recipes.load(FOLDER / f"{name}.yaml")
    (tmp_path / "mine.jsonl").touch()
    recipe = recipes.load(FOLDER / f"{name}.yaml", ["data.train=mine.jsonl"])
    assert recipe.model.name_or_path.startswith("meta-llama/")


def test_llama2_has_the_published_settings() -> None:
    """arXiv 2307.09288, section 3.1: 64 sequences of 4,096 tokens, 2 epochs, cosine from 2e-5, decay 0.1."""
    recipe = read("llama2-7b-sft")
    train = recipe.train
    assert (train.batch_unit, train.batch_size, recipe.data.max_length) == ("tokens", 64 * 4096, 4096)
    assert (train.num_train_epochs, train.lr_scheduler_type, train.learning_rate) == (2, "cosine", 2e-5)
    assert (train.weight_decay, train.warmup_ratio, recipe.data.train_on) == (0.1, 0.0, "assistant")
    assert recipe.data.packing and recipe.adapter is None


def test_llama2s_reward_model_has_the_published_settings() -> None:
    """arXiv 2307.09288, section 3.2.2: margin, 512 pairs, one epoch, cosine from 1e-5 to a tenth, 3% warm-up."""
    recipe = read("llama2-7b-reward")
    train = recipe.train
    assert recipe.loss.type == "bradley_terry" and recipe.loss.parameters == {"margin_weight": 1.0}
    assert (train.batch_unit, train.batch_size, train.num_train_epochs) == ("examples", 512, 1)
    assert (train.learning_rate, train.lr_scheduler_type, train.min_lr_ratio) == (1e-5, "cosine", 0.1)
    assert (train.warmup_ratio, train.weight_decay, train.max_grad_norm) == (0.03, 0.1, 1.0)
    assert recipe.adapter is None


@pytest.mark.parametrize("name", ["chat-qlora", "llama3.1-8b-qlora"])
def test_qlora_recipes_quantise(name: str) -> None:
    recipe = read(name)
    assert recipe.model.load_in_4bit and recipe.model.bnb_4bit_quant_type == "nf4" and recipe.adapter is not None


@pytest.mark.parametrize("name", ["chat-full", "llama3.2-1b-full", "pretrain"])
def test_full_recipes_have_no_adapter(name: str) -> None:
    assert read(name).adapter is None


def earlier_run(model: Path, chats: Path, folder: Path) -> Path:
    """A run whose adapter a recipe goes on with."""
    run = folder / "earlier"
    if run.is_dir():
        return run
    settings = ["eval.questions=null", "data.eval=null", "data.max_length=512", "train.max_steps=1", "train.threads=1"]
    paths = [f"model.name_or_path={model}", f"data.train={chats}", f"train.output_dir={run}"]
    sft.run(recipes.load(FOLDER / "chat.yaml", [*settings, *paths], stage="sft"))
    return run


def stand_ins(name: str, model: Path, chats: Path, folder: Path) -> list[str]:
    """Overrides that put a tiny model and tiny data in the place of what the recipe names."""
    recipe, data = read(name), chats
    if recipe.data.format == "text":
        data = folder / "text.jsonl"
        data.write_text("".join(json.dumps({"text": f"The cat sat on mat {i}. " * 20}) + "\n" for i in range(40)))
    overrides: dict[str, object] = {
        "model.name_or_path": model,
        "data.train": data,
        "data.max_length": 512,
        "train.output_dir": folder / "run",
        "train.threads": 1,
    }
    if recipe.stage in PREFERENCE:
        data = overrides["data.train"] = folder / "pairs.jsonl"
        pair = {
            "prompt": "What is the capital?",
            "chosen": "The answer is short.",
            "rejected": "The moon.",
            "margin": 1,
        }
        data.write_text("".join(json.dumps(pair | {"chosen": f"The answer is {i}."}) + "\n" for i in range(40)))
    if recipe.adapter is not None and recipe.adapter.path is not None:
        overrides["adapter.path"] = earlier_run(model, chats, folder)
    if isinstance(recipe.data.eval, tuple):
        overrides["data.eval"] = data
    if recipe.eval.questions is not None:
        questions = folder / "questions.jsonl"
        row = {"messages": [{"role": "user", "content": "What is the capital?"}], "answer": "The answer is short."}
        questions.write_text(json.dumps(row) + "\n")
        overrides["eval.questions"] = questions
    if recipe.train.optim != "adamw_torch":  # the others need a GPU
        overrides["train.optim"] = "adamw_torch"
    return [f"{key}={value}" for key, value in overrides.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_plans_it_and_writes_nothing(
    name: str, tiny_model_dir: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.load(FOLDER / f"{name}.yaml", stand_ins(name, tiny_model_dir, chats_file, tmp_path))
    STAGES[str(recipe.stage)](recipe, dry_run=True)
    assert "steps" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def few(name: str) -> list[str]:
    """Overrides for two small steps."""
    steps = ["train.max_steps=2", "train.batch_size=2"]
    return steps if read(name).stage == "reward" else [*steps, "generate.max_new_tokens=2"]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_two_steps(name: str, tiny_model_dir: Path, chats_file: Path, tmp_path: Path) -> None:
    overrides = [*stand_ins(name, tiny_model_dir, chats_file, tmp_path), "train.batch_unit=null", *few(name)]
    recipe = recipes.load(FOLDER / f"{name}.yaml", overrides)
    STAGES[str(recipe.stage)](recipe)
    kind = "model" if recipe.adapter is None else "adapter"
    assert list((tmp_path / "run" / kind).glob("*.safetensors"))
    steps = {json.loads(line).get("step") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()}
    assert 2 in steps


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_found_from_anywhere_and_trains_two_steps_a_stage(
    name: str, tiny_model_dir: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = pipelines.load(FOLDER / f"{name}.yaml")
    assert loaded.output_dir == Path(f"runs/{name}")
    overrides = []
    for stage in loaded.stages:
        if isinstance(stage, TrainStage):
            source = Path(str(stage.source)).stem
            given = [*stand_ins(source, tiny_model_dir, chats_file, tmp_path), *few(source)]
            overrides += [f"{stage.name}.{o}" for o in given if not o.startswith(("train.output_dir", "adapter.path="))]
    done = runner.run(pipelines.load(FOLDER / f"{name}.yaml", overrides))
    assert [d.stage.name for d in done] == [stage.name for stage in loaded.stages]
    assert all(list(d.stage.result.glob("*.safetensors")) for d in done)
