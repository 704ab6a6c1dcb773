"""The reward stage: what it refuses, what its report says of held-out pairs, and the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import SENTENCES
from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.errors import DataError, ModelError, RecipeError
from tuner.losses import reward as losses
from tuner.stages import reward
from tuner.stages.reward import Reward
from tuner.types import Batch, Tokens, span

ROOT = Path(__file__).resolve().parents[2]
WORDS = " ".join(SENTENCES).split()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(i: int = 0, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    prompt, chosen, rejected = (" ".join(rng.choice(WORDS, 1 + int(rng.integers(12)))) for _ in range(3))
    return {"prompt": prompt, "chosen": f"one {chosen}", "rejected": f"two {rejected}"} | more


@pytest.fixture
def rank(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A LoRA recipe over 16 pairs with margins: two steps of 8, fp32, one thread; 12 other pairs are held out."""
    write(tmp_path / "train.jsonl", *(pair(i, margin=i % 4) for i in range(16)))
    write(tmp_path / "eval.jsonl", *(pair(100 + i, margin=i % 3) for i in range(12)))
    file = tmp_path / "reward.yaml"
    file.write_text(
        f"""
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl, chat_template: llama3, max_length: 256}}
loss: {{type: bradley_terry, margin_weight: 1.0}}
train: {{output_dir: {tmp_path}/run, batch_size: 8, learning_rate: 5e-3, threads: 1}}
"""
    )
    return file


def load(file: Path, *overrides: str) -> recipes.Recipe:
    return recipes.load(file, overrides, stage="reward")


# --- what is refused ---

MARGIN_FREE = "loss={type: bradley_terry}"


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize(
    ("row", "loss", "message"),
    [
        (pair(), None, "line 2: the row says no margin, which loss .* reads from every row; add a column 'margin'"),
        (pair(margin=-1), None, "line 2: the row has a margin of -1, by which the rejected answer would be the better"),
        (
            {"prompt": "a", "completions": ["b", "c", "d"]},
            None,
            "line 2: the row has 3 answers, and loss.margin_weight reads the margin of a pair",
        ),
        (
            {"prompt": "a", "completions": ["b", "c", "d"], "scores": [2, 1, 1]},
            MARGIN_FREE,
            "line 2: the row has two answers of one score, so that neither is the better one",
        ),
        ({"prompt": "a", "completions": ["b"]}, MARGIN_FREE, "line 2.*not a list of at least two completions"),
        (
            {"prompt": "a", "completion": "b", "label": True},
            MARGIN_FREE,
            "has 1 answer, and this loss compares answers",
        ),
        ({"prompt": "a", "completion": "b"}, MARGIN_FREE, "preference"),
    ],
)
def test_rows_that_rank_nothing(
    name: str, row: dict[str, Any], loss: str | None, message: str, rank: Path, tmp_path: Path
) -> None:
    good = {"prompt": "a", "completions": ["x", "y"], "scores": [2, 1]} if "completions" in row else pair(1, margin=1)
    odd = write(tmp_path / "odd.jsonl", *([] if "completion" in row else [good]), row)
    sources = {key: str(odd if key == name else tmp_path / f"{key}.jsonl") for key in ("train", "eval")}
    with pytest.raises(DataError, match=message):
        reward.run(load(rank, *(f"data.{k}={v}" for k, v in sources.items()), *([loss] if loss else [])))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "loss"),
    [
        ([pair(50), pair(51, margin=-1)], "loss={type: bradley_terry, margin_weight: 1.0}"),
        ([{"prompt": "a", "completions": ["b", "c", "d"], "scores": [2, 1, 1]}], MARGIN_FREE),
        ([{"prompt": "a", "completion": "b", "label": True}], MARGIN_FREE),
    ],
)
def test_rows_that_rank_nothing_are_skipped_as_the_check_of_data_says(
    rows: list[dict[str, Any]], loss: str, rank: Path, tmp_path: Path
) -> None:
    odd = write(tmp_path / "odd.jsonl", *rows)
    sources = [f"data.{key}=[{{path: {tmp_path}/{key}.jsonl}}, {{path: {odd}}}]" for key in ("train", "eval")]
    recipe = load(rank, *sources, loss, "data.on_bad_row=skip")
    reward.run(recipe)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [manifest["data"][key]["samples"] for key in ("train", "eval")] == [16, 12]
    found = {finding.kind: finding for finding in reward.prepare.check_data(recipe).findings}
    assert (found["unfit"].severity, found["unfit"].count) == ("warning", 2 * len(rows))


def test_the_longest_list_makes_the_table_as_wide(rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    monkeypatch.setattr(reward, "Reward", lambda loss, width: widths.append(width) or Reward(loss, width))
    lists = [{"prompt": f"a {i}", "completions": ["one", "two", "three", "four"][: 2 + i]} for i in range(3)]
    reward.run(load(rank, f"data.eval={write(tmp_path / 'lists.jsonl', *lists)}", MARGIN_FREE))
    assert widths == [4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.questions=questions.jsonl", "eval.questions has no effect: a reward model writes no text"),
        ("generate.max_new_tokens=3", "generate.max_new_tokens has no effect: a reward model writes no text"),
        ("reference.cache=true", "reference.cache has no effect: only `tuner dpo` compares with a reference"),
        ("data.train_on=last", "data.train_on has no effect: a reward is read at the end of an answer"),
        ("data.overlong=truncate", "data.overlong: a reward is read at the end of an answer, which truncate cuts off"),
    ],
)
def test_keys_that_a_reward_model_does_not_read(override: str, message: str, rank: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(rank, override)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("loss={type: sigmoid}", "'sigmoid'"),
        ("loss={type: plackett_luce, margin_weight: 1.0}", "margin_weight"),
        ("loss={type: bradley_terry, margin_weight: -1}", "margin_weight"),
        ("loss={type: bradley_terry, beta: 0.1}", "beta"),
    ],
)
def test_losses_of_other_stages_and_their_parameters(loss: str, message: str, rank: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        reward.run(load(rank, loss))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_head_is_refused_before_the_data_is_read(
    rank: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    labels = {"architectures": ["LlamaForSequenceClassification"], "id2label": {str(i): str(i) for i in range(3)}}
    (tiny_model_dir / "config.json").write_text(json.dumps(config | labels))
    monkeypatch.setattr(reward.prepare, "load_split", lambda *a, **k: pytest.fail("the data was read"))
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        reward.run(load(rank))


def test_longer_lists_are_dropped_and_counted(rank: Path, tmp_path: Path) -> None:
    long = pair(50, margin=1) | {"rejected": "mat " * 300}
    write(tmp_path / "train.jsonl", *(pair(i, margin=i % 4) for i in range(8)), long)
    with pytest.raises(DataError, match="line 9: .* more than data.max_length: 256"):
        reward.run(load(rank))
    reward.run(load(rank, "data.overlong=drop"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["train"]["samples"] == 8


# --- what the report says ---


def answers(count: int, length: int = 4) -> tuple[Any, ...]:
    return tuple((span(range(30, 30 + length + i), True),) for i in range(count))


def table(counts: list[int], margins: list[float | None], width: int) -> tuple[Reward, Tensor]:
    """A stage, and the constants of lists of so many answers; answer i has 4 + i tokens."""
    stage = Reward(losses.resolve("bradley_terry", {}), width=width)
    samples = [
        Tokens((span([0], False),), answers(n), row=row, scores=() if m is None else (m, 0.0))
        for row, (n, m) in enumerate(zip(counts, margins, strict=True))
    ]
    return stage, stage.constants(pack(samples), samples)


def test_lists_of_several_lengths_in_one_table() -> None:
    stage, constants = table([2, 3], [1.5, None], width=3)
    assert constants[:, 0].tolist() == [2, 3] and constants[0, 1] == 1.5 and math.isnan(constants[1, 1])
    assert constants[:, 2:].tolist() == [[4, 5, 0], [4, 5, 6]]
    samples = [Tokens((span([0], False),), answers(n), row=n) for n in (2, 3)]

    def model(batch: Batch) -> Tensor:
        return batch.seq_doc * 10.0 + batch.seq_branch  # which answer it is

    assert stage.scores(model, pack(samples), samples).tolist() == [[1, 2, 0], [11, 12, 13]]
    sums = stage.whole_losses(torch.tensor([[3.0, 1.0, 9.0], [1.0, 1.0, 0.0]]), constants)
    assert float(sums["accuracy"]) == pytest.approx(1.0 + (0.5 + 1 + 1) / 3)
    assert float(sums["margin"]) == pytest.approx(2.0 + (0 + 1 + 1) / 3)
    assert float(sums["reward"]) == pytest.approx(2.0 + 2 / 3)
    assert stage.denominators(samples) == {"bradley_terry": 2, "accuracy": 2, "margin": 2, "reward": 2}


def test_the_measures_of_held_out_lists() -> None:
    stage, constants = table([2, 2, 2, 3], [0.0, 1.0, 1.0, None], width=3)
    scores = torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [3.0, 2.0, 1.0]])
    found = stage.measures(scores, constants)
    assert found["longer_is_better"] == 0.0, "the first answers, which are the better ones, are the shorter ones"
    assert (found["margin_below_1_accuracy"], found["margin_below_1_pairs"]) == (0.0, 1)
    assert (found["margin_from_1_accuracy"], found["margin_from_1_pairs"]) == (0.75, 2)
    rewards, lengths = [0, 1, 2, 1, 1, 1, 3, 2, 1], [4, 5, 4, 5, 4, 5, 4, 5, 6]
    assert found["reward_length_correlation"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    chosen, rejected = torch.tensor([0.0, 2, 1, 3, 3, 2]), torch.tensor([1.0, 1, 1, 2, 1, 1])
    assert found["calibration_error"] == pytest.approx(losses.calibration(chosen, rejected)[1])


def test_measures_of_equal_rewards_and_of_many_margins() -> None:
    stage, constants = table([2] * 40, [i / 10 for i in range(40)], width=2)
    found = stage.measures(torch.zeros(40, 2), constants)
    assert "reward_length_correlation" not in found, "rewards that do not vary correlate with nothing"
    pairs = {key: value for key, value in found.items() if key.endswith("_pairs")}
    assert list(pairs.values()) == [10, 10, 10, 10] and len(pairs) == 4
    assert {found[key.replace("_pairs", "_accuracy")] for key in pairs} == {0.5}


def test_lists_without_margins_have_no_buckets() -> None:
    stage, constants = table([2, 2], [None, None], width=2)
    assert not any("margin" in key for key in stage.measures(torch.randn(2, 2), constants))


def test_a_run_from_the_command_line(rank: Path, tmp_path: Path) -> None:
    """What it prints is what metrics.jsonl and the manifest keep."""
    command = [sys.executable, "-m", "tuner", "reward", str(rank)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    assert lines[0]["eval_loss"] > math.log(2) and lines[0]["eval_accuracy"] == 0.5, "a margin is to be reached"
    after = summary["after"]
    assert after == {key: value for key, value in lines[-1].items() if key.startswith("eval_")}
    sides = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in map(json.loads, open_rows(tmp_path))]
    assert len(sides) == 12 and sum(after[f"eval_margin_{k}_pairs"] for k in ("below_1", "1_to_2", "from_2")) == 12
    out = done.stdout
    assert "before   held-out loss" in out and f"accuracy {after['eval_accuracy']:.1%}" in out
    longer = f"the longer answer is the better one in {after['eval_longer_is_better']:.1%}"
    assert f"report   held-out accuracy {after['eval_accuracy']:.1%}; chance 50.0%, {longer}" in out
    assert f"calibration error {after['eval_calibration_error']:.3f}; correlation of reward and length" in out
    assert "accuracy by margin: below 1 " in out and " of 4" in out
    assert summary["result"] == "adapter" and "run/adapter" in out


def open_rows(tmp_path: Path) -> list[str]:
    return (tmp_path / "eval.jsonl").read_text().splitlines()


def test_a_dry_run_writes_nothing(rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reward.run(load(rank), dry_run=True)["steps"] == 2
    assert "plan     2 steps of 8 examples" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_finished_run_says_so(rank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = reward.run(load(rank))
    capsys.readouterr()
    assert reward.run(load(rank), resume=True) == summary
    assert "has finished already" in capsys.readouterr().out
