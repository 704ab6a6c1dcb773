"""A recipe file and overrides -> a checked Recipe: typos, types, YAML 1.2, paths, rules, and back to YAML."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from tuner import recipe as recipes
from tuner.errors import RecipeError
from tuner.recipe import Recipe, load
from tuner.recipe.schema import SECTIONS, DataSource

Write = Callable[[str], Path]

MINIMAL = """\
model:
  name_or_path: org/name
data:
  train: org/data
train:
  output_dir: runs/x
  learning_rate: 1e-4
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe into `recipes/` of an empty project that is the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()

    def write(text: str) -> Path:
        path = Path("recipes/r.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str, stage: str | None = None) -> str:
    """The one sentence that `load` answers with."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, stage)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    return message


# --- what a good recipe becomes ---------------------------------------------------------------------------------------


def test_a_minimal_recipe_gets_the_documented_defaults(write: Write) -> None:
    recipe = load(write(MINIMAL), stage="sft")
    assert recipe.stage == "sft"
    assert recipe.adapter is None
    assert recipe.data.train == (DataSource(path="org/data"),)
    assert (recipe.train.batch_size, recipe.train.warmup_ratio, recipe.train.learning_rate) == (64, 0.03, 1e-4)
    assert (recipe.data.max_length, recipe.data.packing, recipe.data.overlong) == (2048, True, "error")
    assert recipe.loss.type == "nll" and recipe.loss.parameters == {}


def test_a_recipe_is_frozen(write: Write) -> None:
    recipe = load(write(MINIMAL))
    with pytest.raises(ValidationError):
        recipe.train.batch_size = 3  # type: ignore[misc]


def test_data_sources_take_a_path_a_mapping_or_a_list(write: Write) -> None:
    full = "data.train=[{path: org/a, weight: 2, limit: 5}, org/b]"
    recipe = load(write(MINIMAL), [full, "data.eval={path: org/c, split: test}"])
    assert recipe.data.train == (DataSource(path="org/a", weight=2.0, limit=5), DataSource(path="org/b"))
    assert recipe.data.eval == (DataSource(path="org/c", split="test"),)
    assert load(write(MINIMAL), ["data.eval=0.05"]).data.eval == 0.05


def test_loss_parameters_are_kept_for_the_loss_to_check(write: Write) -> None:
    recipe = load(write(MINIMAL), ["loss.beta=0.1"])
    assert recipe.loss.parameters == {"beta": 0.1}
    assert recipes.flatten(recipe)["loss.beta"] == 0.1


def test_empty_sections_are_sections_of_defaults(write: Write) -> None:
    assert load(write(MINIMAL + "eval:\nlog:\n  # save_steps: 10\n")).log.save_steps is None


def test_an_empty_adapter_section_is_no_guess(write: Write) -> None:
    message = refused(write(MINIMAL + "adapter:\n"))
    assert message.startswith("recipes/r.yaml:8: adapter is empty") and "adapter: {}" in message
    assert load(write(MINIMAL + "adapter: {}\n")).adapter is not None


@pytest.mark.parametrize("value", ["q_proj", "[q_proj, v_proj]", "all-linear"])
def test_target_modules(write: Write, value: str) -> None:
    adapter = load(write(MINIMAL), [f"adapter.target_modules={value}"]).adapter
    assert adapter is not None
    expected = {"q_proj": ("q_proj",), "[q_proj, v_proj]": ("q_proj", "v_proj"), "all-linear": "all-linear"}
    assert adapter.target_modules == expected[value]


# --- a typo in any key --------------------------------------------------------------------------------------


def typos(key: str) -> Iterator[str]:
    """One letter left out, doubled, changed, or two swapped, spread over the word."""
    for i in sorted({0, len(key) // 2, len(key) - 1}):
        yield key[:i] + key[i + 1 :]
        yield key[: i + 1] + key[i:]
        yield key[:i] + ("z" if key[i] != "z" else "q") + key[i + 1 :]
        if i + 1 < len(key) and key[i] != key[i + 1]:
            yield key[:i] + key[i + 1] + key[i] + key[i + 2 :]


def typo_cases() -> Iterator[tuple[str, str, str]]:
    for section, model in SECTIONS.items():
        for key in model.model_fields:
            yield from ((section, key, typo) for typo in typos(key) if typo and typo not in model.model_fields)
    yield from (("", key, typo) for key in Recipe.model_fields for typo in typos(key) if typo)
    yield from (("source", key, typo) for key in DataSource.model_fields for typo in typos(key) if typo)


def test_every_key_with_a_typo_is_refused_with_the_right_key(write: Write) -> None:
    path, count, started = write(MINIMAL), 0, time.monotonic()
    for section, key, typo in typo_cases():
        if section == "source":
            message = refused(path, f"data.train=[{{path: org/data, {typo}: 1}}]")
        else:
            message = refused(path, f"{section}.{typo}=1" if section else f"{typo}=1")
        either = {"top_k": ("top_k", "top_p"), "top_p": ("top_k", "top_p")}.get(key, (key,))
        assert typo in message and any(k in message.split(typo, 2)[-1] for k in either), (key, message)
        count += 1
    assert count > 500
    assert time.monotonic() - started < 30


def test_a_typo_in_the_file_names_file_and_line(write: Write) -> None:
    message = refused(write(MINIMAL.replace("learning_rate", "learning_rat")))
    assert message == "recipes/r.yaml:7: unknown key 'train.learning_rat' (did you mean 'learning_rate'?)"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.learning_rate=1", "'learning_rate' belongs to section 'train', as train.learning_rate"),
        ("learning_rate=1", "'learning_rate' belongs to section 'train', as train.learning_rate"),
        ("learning_rat=1", "did you mean 'train.learning_rate'?"),
        ("data.limit=3", "belongs to one source, as in data.train: [{path: ..., limit: ...}]"),
        ("train.lr=1", "it is called train.learning_rate here"),
        ("data.max_seq_length=1", "it is called data.max_length here"),
        ("log.steps=1", "did you mean 'save_steps' or 'eval.steps'?"),
        ("train.qwertz=1", "known here: output_dir, batch_size"),
    ],
)
def test_a_key_from_elsewhere_is_told_where_it_belongs(write: Write, override: str, expected: str) -> None:
    message = refused(write(MINIMAL), override)
    assert message.startswith(f"override '{override}': unknown key") and expected in message


# --- types and bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=many", "train.batch_size: expected an integer, got 'many'"),
        ("train.batch_size=1.5", "train.batch_size: expected an integer, got 1.5"),
        ("train.batch_size=0", "train.batch_size: expected a number of at least 1, got 0"),
        ("train.batch_size=true", "train.batch_size: expected an integer, got true"),
        ("train.microbatch_tokens=many", "train.microbatch_tokens: expected 'auto' or an integer, got 'many'"),
        ("train.microbatch_tokens=0", "microbatch_tokens: expected 'auto' or a number of at least 1, got 0"),
        ("train.microbatch_tokens=1e9", "microbatch_tokens: expected 'auto' or an integer, got 1000000000.0"),
        ("train.microbatch_tokens=9999999999", "expected 'auto' or a number of at most 2147483647, got 9999999999"),
        ("data.max_length=9999999999", "data.max_length: expected a number of at most 2147483647, got 9999999999"),
        ("train.learning_rate=0", "train.learning_rate: expected a number above 0, got 0"),
        ("train.learning_rate=.nan", "train.learning_rate: expected a finite number, got nan"),
        ("train.learning_rate=.inf", "train.learning_rate: expected a finite number, got inf"),
        ("train.output_dir=3", "train.output_dir: expected text, got 3"),
        ("train.optim=adamw_torh", "got 'adamw_torh' (did you mean 'adamw_torch'?)"),
        ("train=3", "train: expected a section of keys, got 3"),
        ("adapter.lora_dropout=1", "adapter.lora_dropout: expected a number below 1, got 1"),
        (
            "train.activation_checkpointing=selectiv",
            "expected true or false or 'selective', got 'selectiv' (did you mean 'selective'?)",
        ),
        ("adapter.init_lora_weights=pisa", "'pissa_niter_N', got 'pisa' (did you mean 'pissa'?)"),
        ("data.packing=no", "data.packing: expected true or false, got 'no'"),
        ("data.eval=2", "data.eval: expected a number below 1, got 2"),
        ("data.eval=true", "data.eval: expected a number, got true"),
        ("data.eval=[]", "data.eval: expected at least one entry, got []"),
        ("data.train=[org/a, 5]", "data.train[1]: expected a path, a Hub id or a mapping with a path, got 5"),
        ("data.train=[{split: x}]", "data.train[0].path is missing"),
        ("data.columns={prompt: 3}", "data.columns.prompt: expected text, got 3"),
        ("log.report_to=tensorbord", "(did you mean 'tensorboard'?)"),
        ("version=2", "version: expected 1, got 2"),
    ],
)
def test_wrong_values_are_named_plainly(write: Write, override: str, expected: str) -> None:
    message = refused(write(MINIMAL), override)
    assert message.startswith(f"override '{override}': ") and message.endswith(expected) or expected in message


def test_missing_keys_are_named(write: Write) -> None:
    assert "train.learning_rate is missing" in refused(write(MINIMAL.replace("  learning_rate: 1e-4\n", "")))
    assert "model is missing" in refused(write("data:\n  train: org/x\n"))


def test_the_first_mistake_of_the_file_is_told(write: Write) -> None:
    text = MINIMAL.replace("1e-4", "fast").replace("org/data", "[]")
    assert refused(write(text)).startswith("recipes/r.yaml:4: data.train: expected at least one entry")


# --- YAML 1.2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5E-5", 5e-5), (".5", 0.5), ("1.", 1.0), ("1e0", 1.0), ("2", 2.0)]
)
def test_numbers_are_numbers(write: Write, text: str, value: float) -> None:
    assert load(write(MINIMAL.replace("1e-4", text))).train.learning_rate == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.packing=off", "expected true or false, got 'off'"),
        ("model.revision=3.10", "expected text, got 3.1"),
        ("train.seed=1:30", "expected an integer, got '1:30'"),
        ("train.batch_size='8'", "expected an integer, got '8'"),
        ("train.batch_size=1_000", "expected an integer, got '1_000'"),
        ("train.seed=" + "9" * 5000, "expected an integer, got '999"),
    ],
)
def test_scalars_are_not_guessed(write: Write, override: str, expected: str) -> None:
    assert expected in refused(write(MINIMAL), override)


def test_dates_and_octals_are_what_yaml_1_2_says(write: Write) -> None:
    assert load(write(MINIMAL), ["model.revision=2024-01-01"]).model.revision == "2024-01-01"
    assert load(write(MINIMAL), ["train.seed=010"]).train.seed == 10
    assert load(write(MINIMAL), ["model.revision='3.10'"]).model.revision == "3.10"


def test_duplicate_keys_are_refused_with_both_lines(write: Write) -> None:
    message = refused(write(MINIMAL + "  learning_rate: 2e-4\n"))
    assert message == "recipes/r.yaml:8: key 'learning_rate' is given twice (first on line 7); keep one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: !!python/object/apply:os.system ['touch canary']\n", "tags"),
        ("train: !!float 3\n", "tags"),
        ("train: [1, 2\n", "not valid YAML"),
        ("train: @x\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "a second one begins here"),
        ("- a\n", "a recipe is a mapping of sections"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
        ("a: *nowhere\n", "names no finished anchor"),
        ("a: &x [*x]\n", "names no finished anchor"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("a: " + "[" * 1000, "nested more than 16 deep"),
        ("a: \x07\n", "not valid YAML"),
        ("x" * 70_000, "larger than 64 KiB"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(write: Write, text: str, expected: str) -> None:
    assert expected in refused(write(text))
    assert not Path("canary").exists()


def test_an_alias_bomb_is_refused_at_once(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    started = time.monotonic()
    assert "expands to more than 10,000 values" in refused(write("\n".join(lines)))
    assert time.monotonic() - started < 1


def test_a_large_file_of_many_keys_is_refused_within_a_second(write: Write) -> None:
    path = write("".join(f"key{i}: {i}\n" for i in range(4000)))
    started = time.monotonic()
    refused(path)
    assert time.monotonic() - started < 2


def test_aliases_work(write: Write) -> None:
    text = MINIMAL.replace("org/data", "&d org/data") + "  warmup_steps: &n 5\nlog:\n  save_steps: *n\n"
    assert load(write(text)).log.save_steps == 5


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    write(MINIMAL)
    assert "is a folder" in refused(Path("recipes"))
    assert "there is no recipe at 'recipes/nope.yaml'" in refused(Path("recipes/nope.yaml"))
    assert "`tuner recipes copy chat`" in refused(Path("recipes/chat.yaml"))
    assert "(did you mean 'chat'?)" in refused(Path("chatt.yaml"))
    Path("latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    assert refused(Path("latin.yaml")).startswith("latin.yaml:2: not UTF-8")
    path = write("\ufeff" + MINIMAL)
    assert load(path).train.output_dir == "runs/x"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_win_and_make_sections(write: Write) -> None:
    recipe = load(write(MINIMAL), ["train.learning_rate=2e-5", "adapter.r=4", "data.columns.prompt=question"])
    assert recipe.train.learning_rate == 2e-5
    assert recipe.adapter is not None and recipe.adapter.r == 4
    assert recipe.data.columns == {"prompt": "question"}


def test_null_puts_a_key_back_to_its_default(write: Write) -> None:
    path = write(MINIMAL + "  batch_size: 8\nadapter: {r: 8}\n")
    recipe = load(path, ["train.batch_size=null", "adapter="])
    assert recipe.train.batch_size == 64 and recipe.adapter is None
    assert "train.learning_rate is missing" in refused(path, "train.learning_rate=null")
    assert "unknown key" in refused(path, "train.learning_rat=null")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed", "an override has the form section.key=value"),
        ("=3", "an override has the form section.key=value"),
        ("train..seed=3", "an override has the form section.key=value"),
        ("train.seed=[1", "not valid YAML"),
        ("train.seed=!!int 3", "tags"),
        ("data.train.limit=3", "data.train is 'org/data' in the recipe, not a section; give data.train whole"),
    ],
)
def test_overrides_that_are_none(write: Write, override: str, expected: str) -> None:
    message = refused(write(MINIMAL), override)
    assert message.startswith(f"override '{override}'") and expected in message


def test_the_same_override_twice_is_refused(write: Write) -> None:
    assert "train.seed is given twice" in refused(write(MINIMAL), "train.seed=1", "train.seed=2")


def test_stage_must_match_the_command(write: Write) -> None:
    assert load(write("stage: sft\n" + MINIMAL), stage="sft").stage == "sft"
    message = refused(write("stage: dpo\n" + MINIMAL), stage="sft")
    assert message.startswith("recipes/r.yaml:1: stage is 'dpo', but the command is `tuner sft`; run `tuner dpo`")
    assert "(did you mean 'sft'?)" in refused(write("stage: stf\n" + MINIMAL), stage="sft")


# --- rules across fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["model.load_in_4bit=true"], "model.load_in_4bit", "add an adapter section"),
        (
            ["model.load_in_4bit=true", "adapter.init_lora_weights=pissa"],
            "adapter.init_lora_weights",
            "cannot be changed",
        ),
        (["data.overlong=split"], "data.overlong", "data.format: text"),
        (["data.parse_control_tokens=true"], "data.parse_control_tokens", "data.format: text"),
        (["data.format=text"], "data.train_on", "set it to all"),
        (["train.batch_unit=tokens"], "train.batch_unit", "train.batch_size must be given"),
        (["data.eval=0.1", "eval.metric=exact_match"], "eval.metric", "set eval.questions"),
        (["data.eval=0.1", "eval.load_best=true"], "eval.load_best", "set eval.steps"),
        (["data.eval=0.1", "eval.early_stopping_patience=2"], "eval.early_stopping_patience", "set eval.steps"),
        (["eval.questions=r.yaml", "eval.steps=1", "eval.load_best=true"], "eval.load_best", "data.eval"),
        (["model.bnb_4bit_quant_type=nf4"], "model.bnb_4bit_quant_type", "has no effect"),
        (["train.warmup_steps=3", "train.warmup_ratio=0.1"], "train.warmup_ratio", "train.warmup_steps is set too"),
        (["train.lr_scheduler_type=constant", "train.min_lr_ratio=0.1"], "train.min_lr_ratio", "has no effect"),
        (["adapter.r=4", "train.param_dtype=bfloat16"], "train.param_dtype", "has no effect"),
        (["adapter.path=recipes", "adapter.r=4"], "adapter.r", "brings its own"),
        (["eval.steps=3"], "eval.steps", "set data.eval or eval.questions"),
        (["data.eval=0.1", "eval.samples=3"], "eval.samples", "no eval.questions"),
        (["generate.top_k=5"], "generate.top_k", "generate.temperature is 0"),
        (["loss.typ=nll"], "loss.typ", "did you mean 'type'?"),
    ],
)
def test_contradictions_and_keys_without_effect(write: Write, overrides: list[str], key: str, expected: str) -> None:
    message = refused(write(MINIMAL), *overrides)
    assert f": {key}" in message and expected in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.load_in_4bit=true", "adapter.use_dora=true", "model.bnb_4bit_quant_type=fp4"],
        ["train.lr_scheduler_type=constant", "train.warmup_steps=10"],
        ["data.format=text", "data.train_on=all", "data.overlong=split", "data.parse_control_tokens=true"],
        ["data.train=[{path: org/a, format: text}, org/b]", "data.overlong=split"],
        ["train.batch_unit=tokens", "train.batch_size=4096"],
        ["data.eval=0.1", "eval.steps=5", "eval.load_best=true", "eval.early_stopping_patience=2"],
        ["eval.questions=recipes/r.yaml", "eval.steps=5", "eval.metric=exact_match", "eval.load_best=true"],
        ["generate.temperature=0.7", "generate.top_k=5", "generate.top_p=0.9"],
        ["adapter.init_lora_weights=pissa_niter_4", "adapter.use_rslora=true"],
    ],
)
def test_what_belongs_together_is_allowed(write: Write, overrides: list[str]) -> None:
    load(write(MINIMAL), overrides)


# --- secrets ----------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize("where", ["file", "comment", "override"])
def test_a_credential_is_refused_and_never_repeated(write: Write, where: str) -> None:
    if where == "override":
        message = refused(write(MINIMAL), f"model.revision={TOKEN}")
    else:
        message = refused(write(MINIMAL + (f"# {TOKEN}\n" if where == "comment" else f"  optim: {TOKEN}\n")))
        assert message.startswith("recipes/r.yaml:8: ")
    assert "looks like a credential" in message and TOKEN not in message


def test_a_password_in_an_address_is_refused(write: Write) -> None:
    message = refused(write(MINIMAL), "data.train=https://me:hunter2@host/x.jsonl")
    assert "looks like a credential" in message and "hunter2" not in message


# --- paths ------------------------------------------------------------------------------------------------------------


def test_paths_are_found_from_here_first_then_beside_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project / "recipes", project / "data", here / "data"):
        folder.mkdir(parents=True)
    (project / "data" / "x.jsonl").touch()
    recipe = project / "recipes" / "r.yaml"
    recipe.write_text(MINIMAL.replace("org/data", "data/x.jsonl"))
    monkeypatch.chdir(here)
    assert load(recipe).data.train[0].path == str(project / "data" / "x.jsonl")
    (here / "data" / "x.jsonl").touch()
    assert load(recipe).data.train[0].path == str(here / "data" / "x.jsonl")
    assert load(recipe).train.output_dir == "runs/x"


@pytest.mark.parametrize("key", ["model.name_or_path", "data.train", "data.eval", "eval.questions", "adapter.path"])
def test_an_absent_path_names_both_places(write: Write, tmp_path: Path, key: str) -> None:
    message = refused(write(MINIMAL), f"{key}=data/absent.jsonl")
    assert f"{key}" in message and "'data/absent.jsonl' is not there" in message
    assert str(tmp_path / "data" / "absent.jsonl") in message


def test_both_places_are_named_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    path = tmp_path / write(MINIMAL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = refused(path, "data.train=x.jsonl")
    assert f"neither {tmp_path}/elsewhere/x.jsonl nor {tmp_path}/x.jsonl exists" in message


def test_a_hub_id_stays_unless_a_folder_has_its_name(write: Write, tmp_path: Path) -> None:
    path = write(MINIMAL)
    assert load(path).model.name_or_path == "org/name"
    assert "a Hub id has the form org/name" in refused(path, "model.name_or_path=llama")
    (tmp_path / "org").mkdir()
    message = refused(path)
    assert message.startswith("recipes/r.yaml:2: model.name_or_path: 'org/name' could be a Hub id, but the folder")
    (tmp_path / "org" / "name").mkdir()
    (tmp_path / "org" / "data").touch()
    assert load(path).model.name_or_path == str(tmp_path / "org" / "name")


def test_a_revision_of_a_local_path_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    message = refused(write(MINIMAL), "model.name_or_path=base", "model.revision=main")
    assert "model.revision has no effect" in message
    assert load(write(MINIMAL), ["model.revision=main"]).model.revision == "main"


def test_a_finished_run_is_read_without_its_data(write: Write) -> None:
    path = write(MINIMAL.replace("org/data", "data/gone.jsonl"))
    assert load(path, find_inputs=False).data.train[0].path == "data/gone.jsonl"


# --- and back ---------------------------------------------------------------------------------------------------------

NASTY = ["on", "null", "1e-4", "3.10", "- a", "a: b", "#x", "é 中 😀", "'", '"', "a\\b", "x" * 300, "~", "0x1F", " a "]


@pytest.mark.parametrize("text", NASTY)
def test_dump_is_read_back_as_the_same_recipe(write: Write, text: str) -> None:
    recipe = load(write(MINIMAL))
    changed = recipes.resolved(recipe, {"data.columns": {"prompt": text}, "train.output_dir": text})
    assert load(write(recipes.dump(changed))) == changed


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter={}"],
        ["adapter.path=recipes"],
        ["model.load_in_4bit=true", "adapter.target_modules=[q_proj]", "log.report_to=tensorboard"],
        ["train.warmup_steps=3", "train.lr_scheduler_type=constant", "train.learning_rate=1e-7"],
        ["data.eval={path: org/x, limit: 3}", "eval.steps=2", "loss.beta=0.1"],
        ["data.eval=0.01", "generate.temperature=1", "generate.top_p=0.5"],
    ],
)
def test_dump_keeps_every_setting(write: Write, overrides: list[str]) -> None:
    recipe = load(write(MINIMAL), overrides, stage="sft")
    assert load(write(recipes.dump(recipe)), stage="sft") == recipe


def test_resolved_decides_auto_values_and_checks_them(write: Write) -> None:
    recipe = load(write(MINIMAL))
    decided = recipes.resolved(recipe, {"model.dtype": "bfloat16", "train.microbatch_tokens": 4096, "train.threads": 2})
    assert (decided.model.dtype, decided.train.microbatch_tokens, recipe.model.dtype) == ("bfloat16", 4096, "auto")
    with pytest.raises(ValidationError):
        recipes.resolved(recipe, {"model.dtype": "int3"})


def test_flatten_has_one_entry_a_key(write: Write) -> None:
    flat = recipes.flatten(load(write(MINIMAL)))
    assert flat["train.batch_size"] == 64 and flat["adapter"] is None and flat["version"] == 1
    assert flat["data.train"][0]["path"] == "org/data"
    expected = sum(len(model.model_fields) for name, model in SECTIONS.items() if name != "adapter")
    assert len(flat) == expected + len({"version", "stage", "adapter"})


def test_json_schema_describes_every_key() -> None:
    schema = recipes.json_schema()
    sections = [*SECTIONS.values(), DataSource]
    for model in sections:
        described = schema["$defs"][model.__name__]["properties"]
        for name in model.model_fields:
            assert described[name].get("description"), f"{model.__name__}.{name} has no description"
    assert schema["$defs"]["TrainSection"]["additionalProperties"] is False
    train = schema["$defs"]["DataSection"]["properties"]["train"]
    assert {"type": "array"}.items() <= train["anyOf"][-1].items() and train["anyOf"][0]["type"] == "string"


def test_loading_a_recipe_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    code = f"import sys; import tuner.recipe; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_that_can_never_work_are_refused(write: Write) -> None:
    assert "names no module to adapt" in refused(write(MINIMAL + "adapter: {}\n"), "adapter.target_modules=[]")
    assert "holds a control character" in refused(write(MINIMAL), 'train.output_dir="a\\nb"')
    assert "train.threads" in refused(write(MINIMAL), "train.threads=100000")  # torch dies of a segmentation fault
