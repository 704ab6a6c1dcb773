"""Rows that compare nothing, at the command line: each is refused by its row, or skipped and counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import cli

Row = dict[str, Any]
Dry = Callable[..., tuple[int, str, str]]
CHECK = "data check"


def turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


GOOD: list[Row] = [
    {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": 1 + i} for i in range(6)
]
LABELLED: list[Row] = [{"prompt": f"q {i}", "completion": f"answer {i}", "label": bool(i % 2)} for i in range(6)]
BAD: dict[str, tuple[Row, str]] = {
    "equal": (
        {"prompt": "q", "chosen": "a", "rejected": "a", "margin": 1},
        "two of the answers are the same to the token, so that neither is the better one; remove the row",
    ),
    "empty": (
        {"prompt": "q", "chosen": "a", "rejected": "", "margin": 1},
        "an answer is empty, so that there is nothing to compare or to judge; remove the row, or fill it in",
    ),
    "prompts": (
        {"chosen": turns("q", "a"), "rejected": turns("r", "b"), "margin": 1},
        "chosen and rejected go apart at message 0, which is a user turn in chosen; a pair has two answers to one "
        "prompt: remove the row",
    ),
    "margin": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "the row says no margin, which loss 'sigmoid' with these parameters reads from every row; add a column "
        "'margin', or leave the parameter out",
    ),
}


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    file = tmp_path / "pairs.yaml"
    file.write_text(
        f"""
stage: dpo
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{}}
data: {{train: {tmp_path}/rows.jsonl, chat_template: llama3, max_length: 64}}
loss: {{type: sigmoid, margin_weight: 1.0}}
train: {{output_dir: {tmp_path}/run, batch_size: 4, learning_rate: 1e-3, threads: 1}}
"""
    )
    return file


@pytest.fixture
def dry(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dry:
    """`dry(rows, *overrides)` -> exit code, stdout and stderr of `tuner dpo --dry-run`, or of another command."""
    monkeypatch.chdir(recipe.parent)

    def run(
        rows: list[Row], *overrides: str, command: str = "dpo --dry-run", file: Path = recipe
    ) -> tuple[int, str, str]:
        (recipe.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(sys, "argv", ["tuner", *command.split(), str(file), *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_refused_by_its_row(name: str, dry: Dry) -> None:
    row, said = BAD[name]
    code, _, message = dry([*GOOD, row])
    assert code == 2 and message.count("\n") == 1, message
    assert f"rows.jsonl line 7: {said}; 6 of 7 rows could be used (data.on_bad_row: skip)" in message


def test_bad_pairs_are_skipped_counted_and_named(dry: Dry) -> None:
    rows = [*GOOD, *(row for row, _ in BAD.values())]
    code, out, _ = dry(rows, "data.on_bad_row=skip")
    assert code == 0 and "10 rows read, 6 samples" in out
    unusable, unfit = (next(line for line in out.splitlines() if kind in line) for kind in ("unusable", "of no use"))
    assert "3 rows skipped" in unusable and all(f"rows.jsonl line {n}" in unusable for n in (7, 8, 9))
    assert "1 rows skipped" in unfit and "rows.jsonl line 10" in unfit
    _, out, _ = dry(rows, command=CHECK)
    for found in (
        "1 preference rows with two answers that are the same",
        "1 preference rows with an empty answer",
        "1 rows that cannot be used",
        "1 rows whose answers the loss of this recipe cannot use",
    ):
        assert found in out


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_pairs_that_no_longer_fit(overlong: str, dry: Dry) -> None:
    long = "word " * 60
    rows = [
        *GOOD,
        {"prompt": "q", "chosen": long + "a", "rejected": long + "b", "margin": 1},
        {"prompt": long, "chosen": "a", "rejected": "b", "margin": 1},
        {"prompt": "q", "chosen": "yes " + long, "rejected": "no", "margin": 1},
    ]
    code, out, message = dry(rows, f"data.overlong={overlong}")
    if overlong == "error":
        assert code == 2 and "rows.jsonl line 7: " in message and "data.overlong to drop or truncate" in message
        return
    said = {
        "drop": ["9 rows read, 6 samples", "3 rows dropped as longer than data.max_length"],
        "truncate": [
            "9 rows read, 7 samples",
            "1 rows dropped because data.overlong: truncate left two answers that are the same: rows.jsonl line 7",
            "1 rows dropped because data.overlong: truncate left nothing to train on: rows.jsonl line 8",
            "1 rows cut at data.max_length (data.overlong: truncate): rows.jsonl line 9",
        ],
    }
    assert code == 0 and all(line in out for line in said[overlong]), out


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ([{"messages": turns("q", "a")}], ["loss={type: sigmoid}"], "chat data, and this stage trains on preference"),
        (LABELLED, ["loss={type: sigmoid}"], "line 1: the row has 1 answer, and this loss compares pairs"),
        (
            [{"prompt": "q", "completions": ["a", "b", "c"]}],
            ["loss={type: kto}"],
            "line 1: the row has 3 answers, and this loss judges single answers; give rows with a label, or pairs",
        ),
        (LABELLED, ["loss={type: kto}", "train.batch_size=1"], "train.batch_size: 1 leaves loss 'kto' no other row"),
        (LABELLED, ["loss={type: kto}", "reference.cache=true"], "reference.cache: loss 'kto' scores answers after"),
    ],
)
def test_rows_that_the_loss_has_no_use_for(rows: list[Row], overrides: list[str], said: str, dry: Dry) -> None:
    code, _, message = dry(rows, *overrides)
    assert code == 2 and said in message and message.count("\n") == 1, message


def test_one_label_is_told_and_pairs_may_stand_for_labels(dry: Dry) -> None:
    kto, false = "loss={type: kto}", [row | {"label": False} for row in LABELLED]
    code, out, _ = dry(false, kto)
    assert code == 0 and "all of 6 answers are labelled false, so nothing tells good from bad ones" in out
    assert "6 labelled answers, all of which have the same label (false)" in dry(false, kto, command=CHECK)[1]
    code, out, _ = dry(GOOD, kto)
    assert code == 0 and "6 rows are pairs: each gives loss 'kto' a good and a bad answer" in out
    assert "of which have the same label" not in dry(GOOD, kto, command=CHECK)[1]


def test_control_tokens_are_a_matter_of_preference_stages(dry: Dry, recipe_file: Path) -> None:
    code, out, _ = dry(GOOD, "data.train_control_tokens=false")
    assert code == 0 and "without its terminator" not in out
    trained = [int(text.split("tokens, ")[1].split()[0]) for text in (out, dry(GOOD)[1])]
    assert trained[1] - trained[0] == 2 * len(GOOD), "of each answer its terminator"
    code, _, message = dry(GOOD, "data.train_control_tokens=false", command="sft --dry-run", file=recipe_file)
    assert code == 2 and "data.train_control_tokens has no effect" in message
