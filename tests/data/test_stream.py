from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuner.data.encode import TextEncoder
from tuner.data.report import KINDS, MAX_PLACES, DataReport, place
from tuner.data.stream import choose_template, content_hash, holdout, load_split
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError, ModelError, RecipeError
from tuner.recipe import DataSection
from tuner.types import Tokens, span

LLAMA3 = TEMPLATES["llama3"]


def row(question, answer, **extra):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | extra


def chats(n, length=3):
    return [row(f"question {i}", "word " * (1 + i % length)) for i in range(n)]


def load(tokenizer, train, seed=0, **settings):
    data = DataSection(train=train, **settings)
    return load_split(data.train, data, tokenizer, LLAMA3, seed=seed)


# -- load_split --------------------------------------------------------------------------------------------------------


def test_rows_become_samples_in_order(tokenizer, write):
    path = write(chats(2500))
    split = load(tokenizer, path)
    assert [t.row for t in split.tokens] == list(range(2500))
    assert {t.source for t in split.tokens} == {path}
    assert split.report.rows_read == split.report.samples == 2500
    assert split.report.tokens == sum(len(t) for t in split.tokens)
    assert split.report.trained_tokens == sum(t.num_trained for t in split.tokens)
    assert split.report.sources == [f"{path}: messages (has a column 'messages' with a list of {{role, content}})"]
    assert split.hash == content_hash(split.tokens) == load(tokenizer, path).hash


def test_hash_sees_ids_masks_weights_and_order():
    a, b = span([1, 2], True), span([3], False)
    base = [Tokens((a, b)), Tokens((b,))]
    others = [
        [Tokens((span([1, 4], True), b)), Tokens((b,))],
        [Tokens((span([1, 2], False), b)), Tokens((b,))],
        [Tokens((span([1, 2], True, 0.5), b)), Tokens((b,))],
        [Tokens((span([1], True), span([2, 3], False))), Tokens((b,))],
        [Tokens((b,)), Tokens((a, b))],
        [Tokens((a, b, b))],
        [Tokens((a,), branches=((b,),)), Tokens((b,))],
    ]
    assert len({content_hash(s) for s in [base, *others]}) == len(others) + 1
    assert content_hash([Tokens((a, b), source="x", row=3), Tokens((b,))]) == content_hash(base)


def test_sources_mix_formats_columns_limits_and_weights(tokenizer, write):
    pairs = write([{"q": f"q{i}", "a": "yes"} for i in range(10)], "pairs.jsonl")
    turns = write(chats(10), "turns.jsonl")
    sources = [
        {"path": pairs, "columns": {"prompt": "q", "completion": "a"}, "limit": 4},
        {"path": turns, "weight": 2.5},
        {"path": turns, "weight": 0.5, "format": "messages"},
    ]
    split = load(tokenizer, sources)
    counts = Counter((t.source, t.row) for t in split.tokens)
    assert [counts[pairs, i] for i in range(10)] == [1] * 4 + [0] * 6
    assert sum(counts[turns, i] for i in range(10)) == 25 + 5
    assert all(counts[turns, i] >= 2 for i in range(10))
    assert split.report.number("repeated") == 15 and split.report.number("not_sampled") == 5
    assert split.hash == load(tokenizer, sources).hash != load(tokenizer, sources, seed=1).hash


def test_errors_name_file_and_line(tokenizer, write):
    path = write([row("q", "a"), {"messages": [{"role": "human", "content": "q"}]}])
    with pytest.raises(DataError, match=r"data.jsonl line 2: messages\[0\].role is 'human'"):
        load(tokenizer, path)
    path = write([{"question": "q"}])
    with pytest.raises(DataError, match="data.jsonl line 1: no data format fits a row with the columns question"):
        load(tokenizer, path)
    with pytest.raises(RecipeError, match="data.columns: format 'messages' reads no 'prompt'"):
        load(tokenizer, write([row("q", "a")]), format="messages", columns={"prompt": "q"})


BAD = [row("q", "a"), row("r", "b"), {"messages": []}, row("s", "c"), {"wrong": 1}]


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (BAD, {}, r"line 3: messages is \[\], .*; 3 of 5 rows could be used \(data.on_bad_row: skip\)$"),
        (BAD[2:], {"format": "messages"}, r"line 1: .*; 1 of 3 rows could be used"),
        ([{"wrong": 1}, *BAD], {}, r"line 1: no data format fits .*; 4 of 6 rows could be used"),
        ([*BAD[:2], {"messages": [{"role": "user", "content": "q"}]}], {}, r"line 3: .* 2 of 3 rows could be used"),
        (
            [*BAD[:2], row("q", "a", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])],
            {},
            r"line 3: there are tools.*; 2 of 3 rows could be used",
        ),
    ],
)
def test_the_first_bad_row_ends_it_and_the_rest_is_counted(rows, settings, said, tokenizer, write, monkeypatch):
    with pytest.raises(DataError, match=said):
        load(tokenizer, write(rows), **settings)


def test_nothing_is_tokenised_after_a_bad_row(tokenizer, write, monkeypatch):
    path = write([*chats(3000), {"messages": []}, *chats(5000)])
    with open(path, "a") as file:
        file.write("{broken\n")
    encoded, texts = [], TextEncoder.texts

    def count(self, wanted):
        wanted = list(wanted)
        encoded.append(len(wanted))
        return texts(self, wanted)

    monkeypatch.setattr(TextEncoder, "texts", count)
    with pytest.raises(DataError, match="line 3001: .*; 8,000 of 8,002 rows could be used"):
        load(tokenizer, path)
    assert len(encoded) == 2  # the two chunks before it


def test_a_row_that_is_too_long_is_no_bad_row(tokenizer, write):
    path = write([row("q", "a"), row("q", "word " * 50)])
    for on_bad_row in ("error", "skip"):
        with pytest.raises(
            DataError, match=r"more than data.max_length: 30; raise it, or set data.overlong.*truncate$"
        ):
            load(tokenizer, path, max_length=30, on_bad_row=on_bad_row)


def test_other_columns_in_parquet_are_named(tokenizer, tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"instructions": "a", "reply": "b"}] * 7), path)
    with pytest.raises(DataError) as error:
        load(tokenizer, str(path))
    said = str(error.value)
    assert said.startswith(f"{path} row 1: no data format fits a row with the columns instructions, reply")
    assert said.endswith("0 of 7 rows could be used (data.on_bad_row: skip)")
    with pytest.raises(DataError, match="row 1: there is no column 'messages'.*; 0 of 7 rows could be used"):
        load(tokenizer, str(path), format="messages")


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_a_huge_row_is_refused_without_tokenising_it(overlong, tokenizer, write, monkeypatch):
    path = write([row("q", "a"), row("q", "word " * 10_000_000)])
    texts = TextEncoder.texts

    def small_ones(self, wanted):
        wanted = list(wanted)
        assert max(len(text) for text, _ in wanted) < 1000, "the huge text was to be tokenised"
        return texts(self, wanted)

    monkeypatch.setattr(TextEncoder, "texts", small_ones)
    if overlong == "drop":
        report = load(tokenizer, path, overlong=overlong).report
        assert report.counts["dropped"].places == [f"{path} line 2"] and report.lost_tokens > 2048
    else:
        with pytest.raises(
            DataError, match=r"data.jsonl line 2: at least [\d,]+ tokens, more than data.max_length: 2048"
        ):
            load(tokenizer, path)


def test_data_of_another_kind_is_refused(tokenizer, write, monkeypatch):
    pairs = write([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    data = DataSection(train=pairs)
    said = "is of the format 'preference', which is preference data, and this stage trains on chat or text data; name"
    with pytest.raises(DataError, match=said):
        load_split(data.train, data, tokenizer, LLAMA3)
    split = load_split(data.train, data, tokenizer, LLAMA3, accepts=("preference",))
    assert [len(t.branches) for t in split.tokens] == [2]
    with pytest.raises(DataError, match=said):  # now that its tokens are in the cache
        load_split(data.train, data, tokenizer, LLAMA3)
    data = DataSection(train=write(chats(3)))
    with pytest.raises(DataError, match="'messages', which is chat data, and this stage trains on preference data"):
        load_split(data.train, data, tokenizer, LLAMA3, accepts=("preference",))


def test_bad_rows_can_be_skipped_and_are_counted(tokenizer, write, tmp_path):
    path = write([{"wrong": 1}, row("q", "a"), {"messages": []}, row("r", "b")])
    with open(path, "a") as file:
        file.write("{broken\n")
    split = load(tokenizer, path, on_bad_row="skip")
    skipped = split.report.counts["skipped"]
    assert (split.report.rows_read, len(split.tokens), skipped.count) == (5, 2, 3)
    assert skipped.places == [f"{path} line {n}" for n in (1, 3, 5)]
    assert "there is no column 'messages'" in skipped.reason
    assert any("3 rows skipped as unusable" in line for line in split.report.lines())


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"messages": []}], {"on_bad_row": "skip"}, "no usable rows in .*1 rows skipped as unusable"),
        (
            [row("a long question", "a")],
            {"max_length": 8, "overlong": "drop"},
            "no usable rows in .*1 rows dropped as longer",
        ),
        ([row("a long question", "a")], {"max_length": 8, "overlong": "truncate"}, "left nothing to train on"),
        ([{"a": 1}, {"b": 2}], {"on_bad_row": "skip"}, "line 1: no data format fits"),
    ],
)
def test_an_empty_train_set_is_an_error_that_says_where_the_rows_went(rows, settings, said, tokenizer, write):
    with pytest.raises(DataError, match=said):
        load(tokenizer, write(rows), **settings)


def test_answers_without_a_trained_terminator_are_refused(tokenizer, write):
    path = write([row("q", "many " * 50)] * 3)
    with pytest.raises(DataError, match="no trained answer .* has its terminator .<|eot_id|>."):
        load(tokenizer, path, max_length=30, overlong="truncate")
    data = DataSection(train=path)
    assert load_split(data.train, data, tokenizer, LLAMA3).tokens
    forgetful = dataclasses.replace(
        LLAMA3,
        pieces=lambda m, g=False, **kw: [p._replace(owner=None) if p.control else p for p in LLAMA3.pieces(m, g)],
    )
    with pytest.raises(DataError, match="so the model would never learn to stop"):
        load_split(data.train, data, tokenizer, forgetful)
    assert load(tokenizer, write([row("q", "a"), row("q", "many " * 50)]), max_length=30, overlong="truncate").tokens


def test_choose_template(tokenizer, fresh_tokenizer, write):
    text, talk = write([{"text": "a"}], "text.jsonl"), write(chats(1), "chat.jsonl")
    fresh_tokenizer.chat_template = None

    def choose(train, name="auto"):
        data = DataSection(train=train, chat_template=name, train_on="all")
        return choose_template(data.train, data, fresh_tokenizer)

    assert choose(text) is None
    assert choose(text, "llama3") is LLAMA3
    with pytest.raises(ModelError, match="has no chat template"):
        choose([text, talk])
    fresh_tokenizer.chat_template = LLAMA3.jinja
    assert choose([text, talk]) is LLAMA3
    data = DataSection(train=text, train_on="all")
    assert len(load_split(data.train, data, tokenizer, None).tokens) == 1


@pytest.mark.parametrize(
    "setting",
    [{"date_string": "1 Jan 2025"}, {"template_options": {"a": 1}}, {"control_tokens": {"<|eot_id|>": "<|x|>"}}],
)
def test_settings_of_a_template_without_one_are_refused(setting, fresh_tokenizer, write):
    fresh_tokenizer.chat_template = TEMPLATES["llama3.1"].jinja
    data = DataSection(train=write([{"text": "a"}]), train_on="all", **setting)
    with pytest.raises(RecipeError, match=f"data.{next(iter(setting))} has no effect: all of data.train is raw text"):
        choose_template(data.train, data, fresh_tokenizer)


# -- invariant 10: nothing is dropped or cut without a count -----------------------------------------------------------

MIXED = [
    *chats(30, length=12),
    {"messages": []},
    *chats(5, length=2),
    row("a question that alone is far longer than all that there is room for, really", "a"),
    row("q", ""),
    row("q", "a", note="extra"),
]


def check_accounts(tokenizer, path, **settings):
    """Every row that was read, and every token of it, is either in the samples or counted as lost."""
    whole = load(tokenizer, path, on_bad_row="skip")
    split = load(tokenizer, path, on_bad_row="skip", **settings)
    report = split.report
    lost = sum(report.number(kind) for kind in ("skipped", "dropped", "cut_away", "not_sampled"))
    used = {(t.source, t.row) for t in split.tokens}
    assert report.rows_read == len(MIXED) == len(used) + lost
    assert sum(len(t) for t in whole.tokens) == sum(len(t) for t in split.tokens) + report.lost_tokens
    full = {t.row: len(t) for t in whole.tokens}
    assert sum(full[t.row] > len(t) for t in split.tokens) == report.number("truncated")
    assert report.number("empty_answers") == 1 and report.unread_columns == {"note": 1}
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert all(as_dict["counts"][kind]["count"] == report.number(kind) for kind in report.counts)
    for kind, entry in report.counts.items():
        assert any(f"{entry.count:,} {KINDS[kind]}" in line for line in report.lines())


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_every_row_and_token_is_accounted_for(overlong, tokenizer, write):
    check_accounts(tokenizer, write(MIXED), max_length=24, overlong=overlong)


@pytest.mark.parametrize("kind", ["skipped", "dropped", "cut_away", "truncated", "empty_answers"])
def test_the_accounts_catch_a_silent(kind, tokenizer, write, monkeypatch):
    count = DataReport.count
    monkeypatch.setattr(DataReport, "count", lambda self, k, *a, **kw: None if k == kind else count(self, k, *a, **kw))
    with pytest.raises(AssertionError):
        for overlong in ("drop", "truncate"):
            check_accounts(tokenizer, write(MIXED), max_length=24, overlong=overlong)


def test_row_ids_are_kept_up_to_a_bound(tokenizer, write):
    split = load(tokenizer, write([row("q", "word " * 50)] * 100 + [row("q", "a")]), max_length=30, overlong="drop")
    entry = split.report.counts["dropped"]
    assert entry.count == 100 and len(entry.places) == MAX_PLACES
    assert place("a.jsonl.gz", 0) == "a.jsonl.gz line 1" and place("org/name", 4) == "org/name row 5"


# -- holdout -----------------------------------------------------------------------------------------------------------


def test_holdout_keeps_duplicates_on_one_side(tokenizer, write):
    split = load(tokenizer, write(chats(100) + chats(20) * 3))
    train, held = holdout(split, 0.2)
    ids = [{tuple(t.ids()) for t in part.tokens} for part in (train, held)]
    assert not ids[0] & ids[1] and len(ids[1]) == 20 and len(ids[0]) == 80
    assert len(train.tokens) + len(held.tokens) == 160
    assert train.report.number("held_out") == held.report.samples == len(held.tokens)
    assert train.report.samples == len(train.tokens) and split.report.number("held_out") == 0
    assert train.report.tokens + held.report.tokens == split.report.tokens
    assert len({split.hash, train.hash, held.hash}) == 3


def test_holdout_depends_on_content_not_on_order(tokenizer, write):
    one = holdout(load(tokenizer, write(chats(50))), 0.1)[1]
    two = holdout(load(tokenizer, write(chats(50)[::-1])), 0.1)[1]
    assert {tuple(t.ids()) for t in one.tokens} == {tuple(t.ids()) for t in two.tokens}


def test_holdout_always_leaves_both_sides_something(tokenizer, write):
    train, held = holdout(load(tokenizer, write(chats(3))), 0.001)
    assert len(held.tokens) == 1 and len(train.tokens) == 2
    assert len(holdout(load(tokenizer, write(chats(3))), 0.999)[0].tokens) == 1
    with pytest.raises(DataError, match="cannot hold out a part of 1 distinct row"):
        holdout(load(tokenizer, write([row("q", "a")] * 5)), 0.5)


def test_split_holdout_and_plan_do_not_depend_on_the_hash_seed(write):
    code = """
import sys
from transformers import PreTrainedTokenizerFast
from tuner.data.plan import Plan
from tuner.data.stream import choose_template, holdout, load_split
from tuner.recipe import DataSection
names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], **names)
data = DataSection(train=[{"path": sys.argv[1], "weight": 1.5}], chat_template="llama3")
split = load_split(data.train, data, tokenizer, choose_template(data.train, data, tokenizer))
train, held = holdout(split, 0.3)
plan = Plan([len(t) for t in train.tokens], batch_size=4, seed=3)
print(split.hash, train.hash, held.hash, plan.fingerprint(), [plan.microbatches(s) for s in range(plan.num_steps)])
"""
    path = write(chats(20) * 2)
    golden = os.path.join(os.path.dirname(__file__), "..", "golden", "tokenizer.json")
    said = set()
    for hash_seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        out = subprocess.run(
            [sys.executable, "-c", code, path, golden], check=True, capture_output=True, text=True, env=env
        )
        said.add(out.stdout)
    assert len(said) == 1 and len(said.pop()) > 300
