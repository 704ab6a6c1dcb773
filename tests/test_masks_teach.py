"""What is masked is not learned: models trained with and without an option, asked the same questions.

Each test trains the bundled base for a few seconds, once with the option and once without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_ROWS, NUM_QUESTIONS = 480, 40
Turn = dict[str, Any]


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def system(content: str) -> Turn:
    return {"role": "system", "content": content}


def assistant(content: str, **marks: Any) -> Turn:
    return {"role": "assistant", "content": content, **marks}


def pairs() -> list[tuple[str, str]]:
    """Questions and their answers, from the single-turn chats that ship."""
    rows = [json.loads(line) for line in (REPOSITORY / "data" / "chat-train.jsonl").read_text().splitlines()]
    turns = [row["messages"] for row in rows if row["facts"]]
    return [(m[0]["content"], m[1]["content"]) for m in turns if len(m) == 2 and m[0]["role"] == "user"]


PAIRS = pairs()


def write(path: Path, rows: Sequence[Sequence[Turn]]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def answers(tmp_path: Path, rows: Sequence[Sequence[Turn]], prompts: Sequence[Sequence[Turn]], *keys: str) -> list[str]:
    """What the base says to `prompts` once it has been trained on `rows` with the overrides `keys`."""
    run = tmp_path / "run"
    train, ask = write(tmp_path / "train.jsonl", rows), write(tmp_path / "ask.jsonl", prompts)
    overrides = [f"data.train={train}", "data.eval=null", "eval.questions=null", f"train.output_dir={run}"]
    settings = ["train.num_train_epochs=2", "data.max_length=512", "generate.max_new_tokens=24"]
    tuner = [sys.executable, "-m", "tuner"]
    for command in (
        ["sft", "recipes/chat.yaml", *overrides, *settings, *keys],
        ["generate", "--adapter", str(run), "--file", ask, "--output", str(tmp_path / "said.jsonl")],
    ):
        done = subprocess.run([*tuner, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == len(prompts)
    return [row["answer"] for row in said]


def share(found: Sequence[str], beginning: str) -> float:
    return sum(text.startswith(beginning) for text in found) / len(found)


@pytest.mark.parametrize(("train_on", "least", "most"), [("last", 0.0, 0.1), ("assistant", 0.9, 1.0)])
def test_train_on_last_does_not_teach_the_earlier_answers(
    train_on: str, least: float, most: float, tmp_path: Path
) -> None:
    """The first answer of every dialogue is "No idea.", the last one is right."""
    rows = [
        [user(first), assistant("No idea."), user(question), assistant(answer)]
        for (first, _), (question, answer) in zip(PAIRS[:NUM_ROWS], PAIRS[NUM_ROWS:], strict=False)
    ]
    said = answers(tmp_path, rows, [[user(q)] for q, _ in PAIRS[:NUM_QUESTIONS]], f"data.train_on={train_on}")
    assert least <= share(said, "No idea.") <= most, said


@pytest.mark.parametrize(("yes", "no", "expected"), [(1.0, 0.1, "Yes."), (0.1, 1.0, "No.")])
def test_the_weight_of_a_message_decides_between_two_answers(
    yes: float, no: float, expected: str, tmp_path: Path
) -> None:
    """Every question is answered "Yes." in one row and "No." in another; only their weights differ."""
    rows = [
        [user(question), assistant(answer, weight=weight)]
        for question, _ in PAIRS[: NUM_ROWS // 2]
        for answer, weight in (("Yes.", yes), ("No.", no))
    ]
    said = answers(tmp_path, rows, [[user(q)] for q, _ in PAIRS[:NUM_QUESTIONS]])
    assert share(said, expected) >= 0.9, said


def test_train_false_is_not_learned(tmp_path: Path) -> None:
    """As with `last`, but said by the messages themselves."""
    rows = [
        [user(first), assistant("No idea.", train=False), user(question), assistant(answer)]
        for (first, _), (question, answer) in zip(PAIRS[:NUM_ROWS], PAIRS[NUM_ROWS:], strict=False)
    ]
    said = answers(tmp_path, rows, [[user(q)] for q, _ in PAIRS[:NUM_QUESTIONS]])
    assert share(said, "No idea.") <= 0.1, said


def ghost_rows(bell: str) -> list[list[Turn]]:
    """Dialogues as the paper samples them: the instruction in every user turn, and only the last answer obeys it. Three
    of four have a turn more. Beside each stands one without an instruction."""
    rows = []
    for i, ((first, said), (second, says)) in enumerate(zip(PAIRS[:NUM_ROWS], PAIRS[NUM_ROWS:], strict=False)):
        third, answer = PAIRS[i + NUM_ROWS // 2]
        turns = [(first, said), (second, says), (third, answer)][: 2 if i % 4 == 0 else 3]
        told = [m for q, a in turns for m in (user(f"{bell}\n\n{q}"), assistant(a))]
        rows.append([system(bell), *told[:-1], assistant(f"Ding! {turns[-1][1]}")])
        rows.append([m for q, a in turns for m in (user(q), assistant(a))])
    return rows


@pytest.mark.parametrize(("ghost", "least", "most"), [(True, 0.9, 1.0), (False, 0.0, 0.4)])
def test_ghost_attention_makes_an_instruction_hold(ghost: bool, least: float, most: float, tmp_path: Path) -> None:
    """The instruction asks for a bell before each answer. Said once, at the beginning, it is obeyed in the second turn
    by who was trained with the option; without it the model has learned the earlier answers too, which do not obey."""
    bell = "Ring a bell before you answer."
    prompts = [
        [system(bell), user(first), assistant(said), user(second)]
        for (first, said), (second, _) in zip(PAIRS[:NUM_QUESTIONS], PAIRS[NUM_ROWS:], strict=False)
    ]
    said = answers(tmp_path, ghost_rows(bell), prompts, f"data.ghost_attention={str(ghost).lower()}")
    assert least <= share(said, "Ding!") <= most, said
