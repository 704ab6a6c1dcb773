"""Exact match over questions: read strictly, asked through the chat template, answered until the terminator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tuner import evaluate as module
from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.errors import DataError
from tuner.evaluate import Question, QuestionReport, answer_questions, exact_match, read_questions
from tuner.recipe import GenerateSection
from tuner.types import Message

GOOD = {"messages": [{"role": "user", "content": "What is one and one?"}], "answer": "two"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be brief.\u2028"}, *GOOD["messages"]]
    path = write(tmp_path / "q.jsonl", GOOD | {"subject": "sums"}, "", {"messages": system, "answer": " drei\n"})
    first, second = read_questions(path)
    assert first == Question((Message("user", "What is one and one?"),), "two")
    assert [m.role for m in second.messages] == ["system", "user"] and second.answer == " drei\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ([], "line 2: found list"),
        ({"question": "?", "answer": "x"}, r"line 2: found \['answer', 'question'\]; a question is"),
        ({"messages": [], "answr": ""}, r"line 2: found \['answr', 'messages'\]"),
        (GOOD | {"answer": " "}, "line 2: answer is ' '"),
        (GOOD | {"answer": 2}, "line 2: answer is 2"),
        (GOOD | {"messages": []}, r"line 2: messages is \[\]"),
        (GOOD | {"messages": ["hi"]}, r"line 2: messages\[0\] is 'hi', not an object"),
        (GOOD | {"messages": [{"role": "user", "content": None}]}, r"line 2: messages\[0\].content is null"),
        (
            GOOD | {"messages": [{"role": "human", "content": "x"}]},
            r"line 2: messages\[0\].role is 'human'; allowed: sys",
        ),
        (GOOD | {"messages": [*GOOD["messages"], {"role": "assistant", "content": "x"}]}, "line 2: the last message"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(DataError, match=message) as caught:
        read_questions(path)
    assert str(path) in str(caught.value)


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(write(tmp_path / "q.jsonl", "", ""))
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8 text .byte 7"):
        read_questions(tmp_path / "b.jsonl")


def test_exact_match_strips_white_space_and_nothing_else() -> None:
    assert exact_match(" two\n", "two")
    assert (
        not exact_match("Two", "two") and not exact_match("two.", "two") and not exact_match("two  words", "two words")
    )


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tokenizer, resolve_template("llama3", tokenizer))


def ask(lm: Any, renderer: Renderer, questions: Sequence[Question], **changes: Any) -> QuestionReport:
    settings = GenerateSection(max_new_tokens=32)
    return answer_questions(lm, renderer, renderer.tokenizer, questions, settings=settings, pad_id=7, **changes)


def question(text: str, answer: str) -> Question:
    return Question((Message("user", text),), answer)


def say(monkeypatch: pytest.MonkeyPatch, *answers: list[int]) -> None:
    monkeypatch.setattr(module, "generate", lambda *a, **k: list(answers))


def test_right_wrong_stopped_and_run_on(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(text: str) -> list[int]:
        return renderer.tokenizer.encode(text, add_special_tokens=False)

    eot, end, header = (
        renderer.tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>")
    )
    say(
        monkeypatch,
        [*ids(" short"), eot],  # right
        ids("short"),  # right, but it did not stop
        [*ids("moon"), end],  # wrong; end of text stops too
        [*ids("short"), header, eot],  # a control token is not the answer
        [eot],  # empty
    )
    questions = [question(f"{i}?", "short") for i in range(5)]
    report = ask(None, renderer, questions)
    assert (report.correct, report.total, report.stopped, report.exact_match) == (2, 5, 4, 0.4)
    assert [(a.question, a.text) for a in report.wrong] == [
        (questions[2], "moon"),
        (questions[3], "short<|start_header_id|>"),
        (questions[4], ""),
    ]
    assert str(report) == "2 of 5 answered exactly (40.0%), 4 stopped by themselves"


def test_every_wrong_answer_is_kept(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, *([50] for _ in range(9)))
    report = ask(None, renderer, [question("?", "no") for _ in range(9)])
    assert report.correct == 0 and len(report.wrong) == 9


def test_a_model_that_learnt_the_answers(
    renderer: Renderer, make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end on a tiny model trained by hand: asked in the words and ids that it was trained on, it answers."""
    pairs = [("the cat", "sat on the mat"), ("the moon", "looked"), ("hello", "world, one two three")]
    lm = make_model()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    stop = renderer.stop_ids[0]
    for _ in range(60):
        for asked, answer in pairs:
            prompt = renderer.prompt_ids([Message("user", asked)])
            ids = torch.tensor([[*prompt, *renderer.tokenizer.encode(answer, add_special_tokens=False), stop]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            lm(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    questions = [question(*pair) for pair in pairs]
    lm.eval()
    report = ask(lm, renderer, questions)
    assert (report.correct, report.stopped) == (3, 3)
    assert ask(lm, renderer, questions, batch_size=1) == report
    monkeypatch.setattr(Renderer, "prompt_ids", lambda self, messages: [0, 50])  # mutant: asked without the template
    assert ask(lm, renderer, questions).correct < 3
