"""Rows of answers that teach nothing: refused or skipped and named, and the check of data agrees with training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import build_tokenizer
from tuner.data.check import check
from tuner.data.fit import Fit
from tuner.data.stream import Split, load_split
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError
from tuner.recipe import DataSection
from tuner.recipe.schema import TrainSection
from tuner.types import Span

Write = Callable[..., str]
Row = dict[str, Any]
LLAMA3 = TEMPLATES["llama3"]
PAIRS = Fit((2,), "this loss compares pairs")
MARGINS = Fit((2,), "this loss compares pairs", margins="the row says no margin")
GOOD: list[Row] = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
SAME = {"prompt": "q", "chosen": "the same", "rejected": "the same"}
TRIMMED = {"prompt": "q", "chosen": "the same", "rejected": " the same\n"}  # llama3 trims
EMPTY = {"prompt": "q", "chosen": "a", "rejected": " "}
LONG = "word " * 60
ALIKE = {"prompt": "q", "chosen": LONG + "a", "rejected": LONG + "b"}
CONVERSATIONS = [[{"role": "user", "content": q}, {"role": "assistant", "content": q * 2}] for q in ("a", "b")]
APART = {"chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]}
THREE = {"prompt": "q", "completions": ["a", "b", "c"]}


def load(tokenizer: PreTrainedTokenizerFast, path: str, fit: Fit | None = None, **settings: Any) -> Split:
    data = DataSection(train=path, **settings)  # type: ignore[arg-type]
    return load_split(data.train, data, tokenizer, LLAMA3, accepts=("preference",), fit=fit)


def looked_at(
    tokenizer: PreTrainedTokenizerFast, path: str, fit: Fit | None = None, **settings: Any
) -> dict[str, tuple[str, int, list[int]]]:
    """Kind of finding -> severity, count, rows counted from 1."""
    data = DataSection(train=path, chat_template="llama3", **settings)  # type: ignore[arg-type]
    train = TrainSection(output_dir="run", batch_size=8, learning_rate=1e-3)
    report = check(data, train, tokenizer, microbatch_tokens=256, accepts=("preference",), fit=fit)
    return {f.kind: (f.severity, f.count, [p.row + 1 for p in f.rows]) for f in report.findings}


UNUSABLE: dict[str, tuple[Row, str, str]] = {
    "equal": (SAME, "same_completions", "line 3: two of the answers are the same to the token"),
    "equal once rendered": (TRIMMED, "same_completions", "line 3: two of the answers are the same to the token"),
    "an empty side": (EMPTY, "empty_side", "line 3: an answer is empty"),
    "two prompts": (APART, "unusable", "line 3: chosen and rejected go apart at message 0"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_pairs_that_teach_nothing_are_refused_or_skipped_by_row(
    tokenizer: PreTrainedTokenizerFast, write: Write, name: str
) -> None:
    row, kind, said = UNUSABLE[name]
    path = write([*GOOD[:2], row, *GOOD[2:]])
    with pytest.raises(DataError, match=said) as error:
        load(tokenizer, path)
    assert "4 of 5 rows could be used" in str(error.value)
    assert looked_at(tokenizer, path)[kind] == ("error", 1, [3])
    split = load(tokenizer, path, on_bad_row="skip")
    assert [t.row for t in split.tokens] == [0, 1, 3, 4]
    assert split.report.counts["skipped"].places == [f"{path} line 3"]
    assert looked_at(tokenizer, path, on_bad_row="skip")[kind] == ("warning", 1, [3])


def test_answers_of_other_texts_and_the_same_ids_are_the_same(write: Write) -> None:
    """As where the tokenizer lowers the case: nothing is left to tell them apart."""
    lowering = build_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    path = write([*GOOD, SAME | {"chosen": "THE same"}])
    with pytest.raises(DataError, match="line 5: two of the answers are the same to the token"):
        load(lowering, path)
    assert looked_at(lowering, path)["same_completions"] == ("error", 1, [5])


def test_ranked_and_labelled_answers_too(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    twice = write([{"prompt": "q", "completions": ["a", "b", "a"]}], "ranked.jsonl")
    with pytest.raises(DataError, match="two of the answers are the same"):
        load(tokenizer, twice)
    blank = write([{"prompt": "q", "completion": "", "label": False}], "unpaired.jsonl")
    with pytest.raises(DataError, match="an answer is empty"):
        load(tokenizer, blank)


def test_a_cut_keeps_the_prompt_whole_and_drops_what_it_makes_equal(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    longer = {"prompt": "q", "chosen": "b " + LONG, "rejected": "c " + LONG}
    beyond = {"prompt": LONG, "chosen": "a", "rejected": "b"}
    path = write([*GOOD, ALIKE, longer, beyond])
    with pytest.raises(DataError, match=r"line 5: [\d,]+ tokens, more than data.max_length: 40"):
        load(tokenizer, path, max_length=40)
    split = load(tokenizer, path, max_length=40, overlong="truncate")
    report = split.report
    assert [t.row for t in split.tokens] == [0, 1, 2, 3, 5]
    assert report.counts["cut_equal"].places == [f"{path} line 5"]
    assert report.counts["truncated"].places == [f"{path} line 6"]
    assert report.counts["cut_away"].places == [f"{path} line 7"]
    cut, whole = split.tokens[4], load(tokenizer, path, max_length=4096).tokens[5]
    trunk = [[int(i) for span in sample.trunk for i in span.ids] for sample in (cut, whole)]
    assert trunk[0] == trunk[1] and tokenizer.decode(trunk[0]).endswith("assistant<|end_header_id|>\n\n")
    for mine, all_of_it in zip(cut.branches, whole.branches, strict=True):
        ids = [[int(i) for span in branch for i in span.ids] for branch in (mine, all_of_it)]
        assert len(trunk[0]) + len(ids[0]) == 40 and ids[0] == ids[1][: len(ids[0])]
    found = looked_at(tokenizer, path, max_length=40, overlong="truncate")
    assert found["cut_equal"] == ("warning", 1, [5])
    dropped = load(tokenizer, path, max_length=40, overlong="drop").report
    assert dropped.number("dropped") == 3 and not dropped.number("cut_equal")


def test_mutant_a_cut_that_does_not_look(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.data.render._alike", lambda branches: False)
    with pytest.raises(AssertionError):
        test_a_cut_keeps_the_prompt_whole_and_drops_what_it_makes_equal(tokenizer, write)


def test_rows_that_the_loss_cannot_use(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    ranked = write([GOOD[0] | {"margin": 1}], "pairs.jsonl"), write([THREE], "ranked.jsonl")
    sources: Any = [{"path": path} for path in ranked]
    said = r"ranked.jsonl line 1: the row has 3 answers, and this loss compares pairs"
    with pytest.raises(DataError, match=said):
        load(tokenizer, sources, PAIRS)
    skipped = load(tokenizer, sources, PAIRS, on_bad_row="skip")
    assert len(skipped.tokens) == 1 and skipped.report.counts["unfit"].places == [f"{ranked[1]} line 1"]
    assert looked_at(tokenizer, sources, PAIRS)["unfit"] == ("error", 1, [1])
    assert len(load(tokenizer, sources, Fit((2,), "", or_more=True)).tokens) == 2
    assert len(load(tokenizer, sources).tokens) == 2, "the tokens of the cache are those of every loss"


def test_margins_in_some_rows_only(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [row | {"margin": 1} for row in GOOD[:3]] + [GOOD[3]]
    path = write(rows)
    with pytest.raises(DataError, match=r"line 4: the row says no margin; 3 of 4 rows could be used"):
        load(tokenizer, path, MARGINS)
    split = load(tokenizer, path, MARGINS, on_bad_row="skip")
    assert [t.row for t in split.tokens] == [0, 1, 2]
    assert "1 rows skipped as of no use to the loss" in "\n".join(split.report.lines())
    assert looked_at(tokenizer, path, MARGINS)["unfit"] == ("error", 1, [4])
    assert looked_at(tokenizer, path, MARGINS, on_bad_row="skip")["unfit"] == ("warning", 1, [4])
    # a loss that reads none takes all rows, and the check says what is odd
    assert len(load(tokenizer, path, PAIRS).tokens) == 4
    assert looked_at(tokenizer, path, PAIRS)["margin_missing"] == ("note", 1, [4])
    assert "margin_missing" not in looked_at(tokenizer, write(rows[:3]), PAIRS)
    assert "margin_missing" not in looked_at(tokenizer, write(GOOD), PAIRS)


def test_scores_that_put_no_answer_before_another(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    """Two of a list at one score; a margin below zero, where it says how much better the chosen answer is."""
    lists = write([THREE, THREE | {"scores": [3, 2, 1]}, THREE | {"prompt": "r", "scores": [2, 1, 2]}], "ranked.jsonl")
    any_list = Fit((2,), "", or_more=True)
    with pytest.raises(DataError, match=r"line 3: the row has two answers of one score.*; 2 of 3 rows could be used"):
        load(tokenizer, lists, any_list)
    assert np.array_equal(load(tokenizer, lists).tokens.gaps, [np.nan, 1, 0], equal_nan=True)
    assert [t.row for t in load(tokenizer, lists, any_list, on_bad_row="skip").tokens] == [0, 1]
    assert looked_at(tokenizer, lists, any_list)["unfit"] == ("error", 1, [3])
    pairs = write([row | {"margin": margin} for row, margin in zip(GOOD, (0, -0.5, 1, -2), strict=True)], "pairs.jsonl")
    positive = replace(MARGINS, positive=True)
    with pytest.raises(DataError, match=r"line 2: the row has a margin of -0.5, by which .*; 2 of 4 rows could"):
        load(tokenizer, pairs, positive)
    assert load(tokenizer, pairs).tokens.gaps.tolist() == [0, -0.5, 1, -2]
    assert [t.row for t in load(tokenizer, pairs, positive, on_bad_row="skip").tokens] == [0, 2]
    assert looked_at(tokenizer, pairs, positive)["unfit"] == ("error", 2, [2, 4])
    assert len(load(tokenizer, pairs, MARGINS).tokens) == 4, "a loss may read margins of either sign"


def test_a_weight_picks_among_the_rows_that_can_be_used(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [row | ({"margin": 1} if i % 2 else {}) for i, row in enumerate(GOOD * 5)]
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    source: Any = [{"path": write(rows), "weight": 0.5}]
    split = load(tokenizer, source, MARGINS, on_bad_row="skip")
    assert len(split.tokens) == 5 and all(t.row % 2 for t in split.tokens)
    assert (split.report.number("unfit"), split.report.number("not_sampled")) == (10, 5)


def test_rows_of_another_kind_are_found_by_the_check(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write([{"messages": CONVERSATIONS[0]}] * 3)
    with pytest.raises(DataError, match="which is chat data, and this stage trains on preference data"):
        load(tokenizer, path)
    assert looked_at(tokenizer, path, on_bad_row="skip")["wrong_kind"] == ("error", 3, [])


def test_answers_that_all_have_one_label(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [{"prompt": f"q {i}", "completion": f"a {i}", "label": True} for i in range(6)]
    assert looked_at(tokenizer, write(rows))["one_label"] == ("warning", 6, [])
    assert "one_label" not in looked_at(tokenizer, write([*rows, rows[0] | {"prompt": "z", "label": False}]))
    assert "one_label" not in looked_at(tokenizer, write(GOOD))


def test_control_tokens_left_out_stay_where_they_are(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    """Terminators of every turn of an answer; headers never count. The cache tells the two settings apart."""
    answer = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "b"},
    ]
    asked = [{"role": "user", "content": "q"}]
    path = write([{"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": "c"}]}])
    (whole,), (without,) = (load(tokenizer, path, train_control_tokens=on).tokens for on in (True, False))
    assert whole.ids() == without.ids()

    def trained(branch: tuple[Span, ...]) -> list[str]:
        return [tokenizer.decode(span.ids) for span in branch if span.trained]

    assert [trained(b) for b in whole.branches] == [["a<|eot_id|>", "b<|eot_id|>"], ["c<|eot_id|>"]]
    assert [trained(b) for b in without.branches] == [["a", "b"], ["c"]]
    assert looked_at(tokenizer, path, train_control_tokens=False) == {}
