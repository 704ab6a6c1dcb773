"""Questions with known answers -> how many the model answers exactly, and how many answers stop by themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tuner.data.formats.messages import to_messages
from tuner.data.render import Renderer
from tuner.errors import DataError
from tuner.generate import LanguageModel, generate
from tuner.recipe import GenerateSection
from tuner.types import Message


@dataclass(frozen=True)
class Question:
    """A conversation that ends where the assistant is to speak, and the answer expected."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Answer:
    """What the model said to a question."""

    question: Question
    text: str
    stopped: bool  # it ended with a terminator, not at generate.max_new_tokens


@dataclass(frozen=True)
class QuestionReport:
    """Exact match over a set of questions."""

    correct: int
    total: int
    stopped: int
    wrong: tuple[Answer, ...]  # in the order of the questions

    @property
    def exact_match(self) -> float:
        """Share of questions answered exactly, 0 to 1."""
        return self.correct / self.total

    def __str__(self) -> str:
        share = f"{self.correct} of {self.total} answered exactly ({100 * self.exact_match:.1f}%)"
        return f"{share}, {self.stopped} stopped by themselves"


def exact_match(predicted: str, expected: str) -> bool:
    """The same text, white space around it apart."""
    return predicted.strip() == expected.strip()


def read_questions(path: Path | str) -> list[Question]:
    """JSON Lines of `{"messages": [{"role": ..., "content": ...}, ...], "answer": "..."}`; other keys only describe.

    DataError names the file and the 1-based line; a file without questions is one too.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"eval.questions: {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"eval.questions: {path} cannot be read: {error.strerror}") from None
    questions = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"eval.questions: {path} holds no questions")
    return questions


def _question(line: str, place: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from None
    wanted = 'a question is {"messages": [{"role": "user", "content": "..."}], "answer": "..."}'
    if not isinstance(row, dict) or not row.keys() >= {"messages", "answer"}:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{place}: found {found}; {wanted}")
    messages, answer = row["messages"], row["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{place}: answer is {answer!r}; it must be a text that is not empty")
    try:
        turns = to_messages(messages, "messages")
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if turns[-1].role == "assistant":
        raise DataError(f"{place}: the last message is the assistant's; end with the user's and move it to answer")
    return Question(turns, answer)


def answer_questions(
    lm: LanguageModel,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    settings: GenerateSection,
    pad_id: int,
    seed: int = 0,
    batch_size: int = 64,
) -> QuestionReport:
    """Answers each question (see `tuner.generate.generate` for what `lm` must be) and scores it by exact match.

    Control tokens other than the terminator stay in the text, so an answer that holds one is not exact.
    """
    stop_ids = renderer.stop_ids
    rows = generate(
        lm,
        [renderer.prompt_ids(question.messages) for question in questions],
        stop_ids=stop_ids,
        pad_id=pad_id,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=seed,
        batch_size=batch_size,
    )
    answers = []
    for question, ids in zip(questions, rows, strict=True):
        stopped = ids[-1] in stop_ids
        text = tokenizer.decode(ids[:-1] if stopped else ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        answers.append(Answer(question, text, stopped))
    wrong = [a for a in answers if not exact_match(a.text, a.question.answer)]
    return QuestionReport(len(answers) - len(wrong), len(answers), sum(a.stopped for a in answers), tuple(wrong))
