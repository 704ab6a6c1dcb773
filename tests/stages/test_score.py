"""`tuner score`: the rewards are those of plain transformers, in the order of the row; two models; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from tests.conftest import SENTENCES
from tuner import recipe as recipes
from tuner.errors import DataError, ModelError, NonFiniteError, RecipeError, RunDirError, TunerError, UserError
from tuner.model.reward import RewardModel
from tuner.stages import reward, sample, score, sft

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    {"prompt": "What is the capital?", "chosen": "The answer is short.", "rejected": "one two three four five " * k}
    for k in (1, 2, 4)
]


@pytest.fixture(autouse=True)
def quiet_libraries(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """As at the command line: stderr is ours alone."""
    caplog.set_level("ERROR", "transformers")
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train(directory: Path, base: Path, *overrides: str, seed: int = 0) -> Path:
    """A reward model of a few steps with large ones, so that rewards differ."""
    pairs = write(directory.with_suffix(".jsonl"), *PAIRS, {**PAIRS[0], "prompt": SENTENCES[0]})
    file = directory.with_suffix(".yaml")
    file.write_text(
        f"""
model: {{name_or_path: {base}, dtype: float32}}
adapter: {{r: 4}}
data: {{train: {pairs}, chat_template: llama3, max_length: 256}}
train: {{output_dir: {directory}, batch_size: 2, max_steps: 3, learning_rate: 2e-2, threads: 1, seed: {seed}}}
"""
    )
    reward.run(recipes.load(file, overrides, stage="reward"))
    return directory


@pytest.fixture
def helpful(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return train(tmp_path / "helpful", tiny_model_dir)


def scored(
    capsys: pytest.CaptureFixture[str], file: Path, adapter: Path | None, **more: Any
) -> tuple[list[dict[str, Any]], str]:
    """The rows on stdout, and what was said on stderr."""
    capsys.readouterr()
    rows = score.run(**({"model": None, "adapter": adapter, "file": file} | more))
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == rows
    return rows, said.err


def plain(lm: PreTrainedModel | PeftModel, tokenizer: Any, prompt: str, answer: str) -> float:
    """The reward of an answer by transformers and the saved tokenizer alone."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return float(lm.eval()(input_ids=ids).logits[0, 0])


def answers_of(row: dict[str, Any]) -> tuple[str, list[str]]:
    if "messages" in row:
        return row["messages"][0]["content"], [row["messages"][1]["content"]]
    if "chosen" in row:
        return row["prompt"], [row["chosen"], row["rejected"]]
    return row["prompt"], row["completions"] if "completions" in row else [row["completion"]]


MIXED: dict[str, list[dict[str, Any]]] = {
    "preference": PAIRS,
    "ranked": [
        {"prompt": "What?", "completions": ["one", "two two", "The moon."], "scores": [1, 3, 2]},
        {"prompt": "Who looked at the moon?", "completions": ["The cat.", "user", "system", "hello world"]},
    ],
    "unpaired": [{"prompt": "What?", "completion": "The mat.", "label": False}],
    "prompt_completion": [{"prompt": "What?", "completion": "The moon."}, {"prompt": "Who?", "completion": "one"}],
    "messages": [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": word}]}
        for word in ("The cat", "sat")
    ],
}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_rewards_are_those_of_plain_transformers_on_the_saved_model(
    kind: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every format, in the order of the row, packed and with shared prompts, with the template that trained."""
    run = train(tmp_path / "run", tiny_model_dir, *(["adapter=null"] if kind == "full" else []))
    lm: Any = AutoModelForSequenceClassification.from_pretrained(
        run / "model" if kind == "full" else tiny_model_dir, num_labels=1, dtype=torch.float32
    )
    if kind == "lora":
        lm = PeftModel.from_pretrained(lm, str(run / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(run / ("model" if kind == "full" else "adapter"))
    which: dict[str, Any] = {"adapter": run} if kind == "lora" else {"adapter": None, "model": str(run)}
    seen: list[float] = []
    for name, rows in MIXED.items():
        found, _ = scored(capsys, write(tmp_path / f"{name}.jsonl", *rows), **which)
        assert [row["row"] for row in found] == list(range(1, len(rows) + 1))
        for row, given in zip(found, rows, strict=True):
            prompt, answers = answers_of(given)
            assert row["rewards"] == pytest.approx([plain(lm, tokenizer, prompt, a) for a in answers], abs=1e-5)
            seen += row["rewards"]
    assert torch.tensor(seen).std() > 0.1


def test_the_preferred_answer_is_that_of_the_data(
    helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one", "two two", "The moon."]
    (row,), _ = scored(capsys, write(tmp_path / "r.jsonl", {"prompt": "What?", "completions": texts}), helpful)
    best = max(range(3), key=lambda i: row["rewards"][i])
    assert row["preferred_highest"] == (best == 0), "the first one is the best where nothing else is said"
    ranks = [{"prompt": "What?", "completions": texts, "ranks": [2, 3, 1][-i:] + [2, 3, 1][:-i]} for i in range(3)]
    found, _ = scored(capsys, write(tmp_path / "r.jsonl", *ranks), helpful)
    assert [row["preferred_highest"] for row in found] == [r["ranks"].index(1) == best for r in ranks]
    assert all(other["rewards"] == row["rewards"] for other in found)
    ties = {"prompt": "What?", "completions": texts, "scores": [1, 1, 0]}
    (row,), said = scored(capsys, write(tmp_path / "r.jsonl", ties), helpful)
    assert "preferred_highest" not in row and "accuracy" not in said


def test_the_summary(
    helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "r.jsonl", *PAIRS)
    rows, said = scored(capsys, file, helpful)
    mean = torch.tensor([r for row in rows for r in row["rewards"]]).mean()
    right = sum(row["preferred_highest"] for row in rows) / 3
    accuracy = f"accuracy {right:.1%} of the pairs in 3 rows that compare answers"
    assert said == f"3 rows, 6 answers; mean reward {mean:+.4f}; {accuracy}\n"
    monkeypatch.setattr(RewardModel, "forward", lambda self, batch: torch.zeros(len(batch.seq_end)))
    rows, said = scored(capsys, file, helpful)
    assert not any(row["preferred_highest"] for row in rows), "a tie is not the highest, and half right"
    assert "accuracy 50.0%" in said


def test_capacity_changes_nothing(helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.jsonl", *PAIRS)
    settings = score._settings(subject := sample.find_subject(None, helpful), file, ())
    tokens = [row.tokens for row in score.read(subject, settings, None)]
    model = sample.load_subject(subject, RewardModel)
    alone, together = (torch.cat(score.rewards(model, tokens, capacity)) for capacity in (1, 4096))
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)


def test_another_template_gives_other_rewards(
    helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.jsonl", *PAIRS)
    own, _ = scored(capsys, file, helpful)
    assert scored(capsys, file, helpful, chat_template="llama3")[0] == own
    assert scored(capsys, file, helpful, chat_template="llama3.1")[0] != own


# --- two models -------------------------------------------------------------------------------------------------------


def test_two_models_are_combined_by_the_rule_of_llama_2(
    helpful: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safe = train(tmp_path / "safe", tiny_model_dir, "adapter=null", "train.learning_rate=1e-2", seed=3)
    weights = safe / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"score.weight": 40 * tensors["score.weight"]}, weights, metadata={"format": "pt"})
    rows = [{**pair, "unsafe": True} for pair in PAIRS] + PAIRS + [{**PAIRS[0], "unsafe": False}]
    file = write(tmp_path / "r.jsonl", *rows)
    found, said = scored(capsys, file, helpful, safety=str(safe))
    one, _ = scored(capsys, file, helpful)
    two, _ = scored(capsys, file, None, model=str(safe))
    whitened: list[float] = []
    low = 0
    for row, h, s, given in zip(found, one, two, rows, strict=True):
        assert (row["helpfulness"], row["safety"]) == (h["rewards"], s["rewards"])
        for a, b, c in zip(row["helpfulness"], row["safety"], row["combined"], strict=True):
            below = 1 / (1 + 2.718281828459045**-b) < 0.15
            assert c == (b if given.get("unsafe") or below else a)
            low += below and not given.get("unsafe")
        assert row["unsafe"] == bool(given.get("unsafe"))
        assert row["preferred_highest"] == (row["combined"][0] > row["combined"][1])
        whitened += row["whitened"]
    assert 0 < low < 8, "both sides of the threshold are seen"
    values = torch.tensor(whitened)
    assert abs(values.mean()) < 1e-5 and values.std(unbiased=False) == pytest.approx(1, abs=1e-5)
    assert "mean helpfulness" in said and "mean safety" in said and "mean combined" in said
    for bad in ("yes", 1):
        with pytest.raises(DataError, match=r"line 1: unsafe is .*; write true or false"):
            score.run(model=None, adapter=helpful, safety=str(safe), file=write(file, {**PAIRS[0], "unsafe": bad}))


def test_a_safety_model_that_cannot_be_used(helpful: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": None, "adapter": helpful, "file": write(tmp_path / "r.jsonl", *PAIRS)}
    with pytest.raises(ModelError, match="^--safety: there is no directory 'nowhere'"):
        score.run(**given, safety="nowhere")
    with pytest.raises(ModelError, match="^--safety: .* is a causal model"):
        score.run(**given, safety=str(tiny_model_dir))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_causal_model_gives_no_rewards_and_a_reward_model_writes_no_text(
    helpful: Path, recipe_file: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "r.jsonl", *PAIRS)
    sft.run(recipes.load(recipe_file, ["train.max_steps=1"]))
    with pytest.raises(ModelError, match=r"^--adapter: '.*adapter' is a causal model, .* train a reward model with"):
        score.run(model=None, adapter=tmp_path / "run", file=file)
    with pytest.raises(ModelError, match=r"^--model: '.*tiny-model' is a causal model"):
        score.run(model=str(tiny_model_dir), adapter=None, file=file)
    with pytest.raises(ModelError, match="is the adapter of a reward model, which writes no text"):
        sample.run(model=None, adapter=helpful, prompt="What?", file=None)
    full = train(tmp_path / "full", tiny_model_dir, "adapter=null")
    with pytest.raises(ModelError, match="is a reward model or another classifier, which writes no text"):
        sample.run(model=str(full), adapter=None, prompt="What?", file=None)
    with pytest.raises(ModelError, match="holds a full model; give it as --model"):
        score.run(model=None, adapter=full, file=file)


LONG = {"prompt": "What?", "chosen": "one", "rejected": "word " * 100}
OPEN = {"messages": [*MIXED["messages"][0]["messages"], {"role": "user", "content": "And?"}]}


@pytest.mark.parametrize(
    ("row", "overrides", "error", "expected"),
    [
        (LONG, (), DataError, "line 1: .*more than data.max_length: 256; raise it"),  # the run's own
        (OPEN, (), DataError, "line 1: it ends with a user turn, so that it has no answer to score"),
        ({"prompt": "What?", "chosen": "one"}, (), DataError, "line 1: .*no data format fits"),
        ({"text": "The cat"}, (), DataError, "is of the format 'text', which has no answers to score"),
        (PAIRS[0], ("data.max_length=2000",), RecipeError, "2000 is more than the 1,024 positions"),
        (PAIRS[0], ("data.max_lenght=9",), RecipeError, r"data.max_lenght' has no effect here \(did you mean"),
        (PAIRS[0], ("train.seed=1",), RecipeError, "override 'train.seed' has no effect here"),
        (PAIRS[0], ("data=1",), RecipeError, "override 'data' has no effect here"),
        (PAIRS[0], ("data.max_length=x",), RecipeError, "override 'data.max_length=x': data.max_length: expected an"),
        (PAIRS[0], ("data.overlong=truncate",), RecipeError, "a reward is read at the end of an answer"),
        (PAIRS[0], ("data.overlong=split",), RecipeError, "data.overlong: split cuts raw text only"),
    ],
)
def test_bad_rows_and_settings(
    helpful: Path,
    tmp_path: Path,
    row: dict[str, Any],
    overrides: tuple[str, ...],
    error: type[TunerError],
    expected: str,
) -> None:
    with pytest.raises(error, match=expected):
        score.run(model=None, adapter=helpful, file=write(tmp_path / "r.jsonl", row), overrides=overrides)


def test_what_is_left_out_is_counted(helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.jsonl", PAIRS[0], LONG, {"prompt": 3, "chosen": "a", "rejected": "b"}, PAIRS[1])
    skip = ("data.overlong=drop", "data.on_bad_row=skip")
    rows, said = scored(capsys, file, helpful, overrides=skip)
    assert [row["row"] for row in rows] == [1, 4]
    assert f"1 rows dropped as longer than data.max_length (data.overlong: drop): {file} line 2" in said
    assert f"1 rows skipped as unusable (data.on_bad_row: skip): {file} line 3" in said
    rows, _ = scored(capsys, file, helpful, overrides=("data.max_length=1024", "data.on_bad_row=skip"))
    assert [row["row"] for row in rows] == [1, 2, 4]
    rows, said = scored(capsys, write(file, OPEN, MIXED["messages"][0]), helpful, overrides=skip)
    assert [row["row"] for row in rows] == [2] and "(first: it ends with a user turn" in said
    with pytest.raises(DataError, match="no usable rows in"):
        score.run(model=None, adapter=helpful, file=write(file, LONG), overrides=skip)


def test_columns_and_precision_are_overridden(
    helpful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, _ = scored(capsys, write(tmp_path / "r.jsonl", *PAIRS), helpful)
    renamed = [{"question": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"], "id": 3} for p in PAIRS]
    file = write(tmp_path / "q.jsonl", *renamed)
    found, said = scored(capsys, file, helpful, overrides=("data.columns.prompt=question",))
    assert found == own and "columns that are not read (rows): id (3)" in said
    narrow, _ = scored(capsys, tmp_path / "r.jsonl", helpful, overrides=("model.dtype=bfloat16",))
    assert narrow != own and narrow[0]["rewards"] == pytest.approx(own[0]["rewards"], abs=0.1)


def test_an_output_that_exists_and_a_reward_that_is_none(
    helpful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "r.jsonl", *PAIRS), tmp_path / "out" / "rewards.jsonl"
    capsys.readouterr()
    rows = score.run(model=None, adapter=helpful, file=file, output=output)
    assert capsys.readouterr().out == ""
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    with pytest.raises(RunDirError, match="rewards.jsonl' exists"):
        score.run(model=None, adapter=helpful, file=file, output=output)
    monkeypatch.setattr(RewardModel, "forward", lambda self, batch: torch.full((len(batch.seq_end),), float("nan")))
    with pytest.raises(NonFiniteError, match=r"r.jsonl line \d: the reward is \[nan, nan\]; nothing was written"):
        score.run(model=None, adapter=helpful, file=file, output=tmp_path / "no.jsonl")
    assert not (tmp_path / "no.jsonl").exists()


def test_a_base_without_an_adapter_is_refused(helpful: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    full = train(tmp_path / "full", tiny_model_dir, "adapter=null")
    with pytest.raises(UserError, match="--base says where the base of an adapter lies, and there is no adapter"):
        score.run(model=str(full), adapter=None, base="x", file=write(tmp_path / "r.jsonl", *PAIRS))
    moved = tiny_model_dir.rename(tmp_path / "moved")
    assert score.run(model=None, adapter=helpful, base=str(moved), file=tmp_path / "r.jsonl")


def test_the_command_line(helpful: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", *PAIRS)

    def tuner(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tuner", "score", "--file", str(file), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    done = tuner("--adapter", str(helpful), "--output", "rewards.jsonl", "data.max_length=128")
    assert done.returncode == 0 and done.stdout == "" and done.stderr.startswith("3 rows, 6 answers; mean reward ")
    assert len((tmp_path / "rewards.jsonl").read_text().splitlines()) == 3
    done = tuner()
    assert done.returncode == 2 and done.stderr.startswith("error: give --model for a checkpoint, or --adapter")
