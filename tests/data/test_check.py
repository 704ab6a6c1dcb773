"""The check of data: each finding where it was planted, and nothing in the clean twin; the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tuner.data.check import check, similar
from tuner.data.check.brief import HINT, brief
from tuner.data.check.content import NO_SCRIPT, SCRIPTS, encoding, script
from tuner.data.check.findings import KINDS, MAX_ROWS
from tuner.data.check.report import CheckReport, LengthBias, Side
from tuner.data.check.scan import bos_fault, lacks_terminator
from tuner.data.store import TokenStore
from tuner.data.stream import holdout, load_split
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError, RecipeError
from tuner.recipe import DataSection
from tuner.recipe.schema import TrainSection
from tuner.types import Span, Tokens, span

Row = dict[str, Any]
Write = Callable[..., str]
WORDS = (
    "river stone lamp window garden paper letter bridge market summer winter copper silver wooden quiet heavy".split()
)


def turn(role: str, content: str, **extra: Any) -> Row:
    return {"role": role, "content": content} | extra


def say(seed: int, words: int = 9) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def chat(seed: int, *turns: Row) -> Row:
    """A chat whose text no other seed has, or the given turns."""
    usual = (turn("user", f"{say(seed)} {seed}?"), turn("assistant", f"{say(seed + 1000)} {seed}."))
    return {"messages": list(turns or usual)}


def chats(n: int, first: int = 0) -> list[Row]:
    return [chat(first + i) for i in range(n)]


def pair(seed: int, chosen: str, rejected: str) -> Row:
    return {"prompt": f"{say(seed)} {seed}?", "chosen": chosen, "rejected": rejected}


def run_check(
    tokenizer: PreTrainedTokenizerFast, train: Any, microbatch_tokens: int = 256, recipe: Row | None = None, **data: Any
) -> CheckReport:
    section = DataSection(train=train, **{"chat_template": "llama3", **data})
    settings = TrainSection(**{"output_dir": "run", "learning_rate": 1e-3, "batch_size": 4, **(recipe or {})})
    return check(section, settings, tokenizer, microbatch_tokens=microbatch_tokens)


def found(report: CheckReport) -> dict[str, tuple[int, list[int]]]:
    """Of each kind that was found: the count, and the row numbers counted from 1."""
    return {f.kind: (f.count, [p.row + 1 for p in f.rows]) for f in report.findings}


# --- each finding, planted among clean rows ---------------------------------------------------------------------------

U, A = turn("user", "how are you today"), turn("assistant", "very well indeed")
LONG = turn("assistant", "word " * 900)
# What else is found where these are: a long row is too long, far longer than the rest, and cut before its terminator.
WITH = {"a cut answer": {"too_long", "far_longer"}, "too long": {"far_longer"}}
WITH |= {"an answer beyond the cut": {"too_long", "far_longer"}, "a role that the template lacks": {"role_order"}}
PLANTED: dict[str, tuple[str, list[Row], Row]] = {
    "an unreadable row": ("unreadable", [[1]], {}),  # type: ignore[list-item]
    "a row of another shape": ("unusable", [{"messages": "x"}, {"messages": 3}], {}),
    "unknown roles": ("unknown_role", [chat(0, turn("human", "hi"), A)], {}),
    "a role that the template lacks": (
        "unknown_role",
        [chat(0, U, turn("tool", "4"), A)],
        {},
    ),
    "train: false everywhere": ("nothing_to_train", [chat(0, U, A | {"train": False})], {}),
    "nobody answers": ("nothing_to_train", [chat(0, U)], {}),
    "half a surrogate pair": ("lone_surrogate", [chat(0, U, turn("assistant", "\ud83d"))], {}),
    "too long": ("too_long", [chat(0, U, LONG)], {"max_length": 200}),
    "a cut answer": ("terminator_missing", [chat(0, U, LONG)], {"max_length": 200, "overlong": "truncate"}),
    "an answer beyond the cut": (
        "nothing_to_train",
        [chat(0, turn("user", LONG["content"]), A)],
        {"max_length": 200, "overlong": "truncate"},
    ),
    "control tokens": ("control_text", [chat(0, turn("user", "stop <|eot_id|> now please"), A)], {}),
    "empty answer": ("empty_answer", [chat(0, U, turn("assistant", " \n"))], {}),
    "empty question": ("empty_turn", [chat(0, turn("user", ""), A)], {}),
    "two users": ("role_order", [chat(0, U, turn("user", "and you"), A)], {}),
    "two assistants": ("role_order", [chat(0, U, A, turn("assistant", "and more"))], {}),
    "ends with a user": ("role_order", [chat(0, U, A, turn("user", "and you"))], {}),
    "assistant first": ("role_order", [chat(0, A, U, turn("assistant", "fine"))], {}),
    "system inside": ("role_order", [chat(0, U, turn("system", "be brief"), A)], {}),
    "repeated": (
        "repeated",
        [chat(0, turn("user", "  HOW are\nyou today "), turn("assistant", "Very  well indeed")), chat(0, U, A)],
        {},
    ),
    "mojibake": ("encoding", [chat(0, turn("user", "un cafÃ© noir"), A)], {}),
    "replaced": ("encoding", [chat(0, turn("user", "un caf\ufffd noir"), A)], {}),
    "NUL": ("encoding", [chat(0, U, turn("assistant", "a\x00b"))], {}),
    "another script": (
        "script",
        [chat(0, turn("user", "где находится ближайшая библиотека"), turn("assistant", "за углом направо"))],
        {},
    ),
    "far longer": ("far_longer", [chat(0, U, LONG)], {}),
    "more columns": ("unread_columns", [chat(50) | {"note": "x"}], {}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_row_is_found_and_its_clean_twin_is_not(
    tokenizer: PreTrainedTokenizerFast, write: Write, name: str
) -> None:
    kind, rows, settings = PLANTED[name]
    clean = chats(30)
    planted = [*clean[:10], *rows, *clean[10:]]
    count = 1 if kind == "repeated" else len(rows)
    expected = list(range(10 + len(rows) - count + 1, 10 + len(rows) + 1))
    report = run_check(tokenizer, write(planted), **settings)
    assert found(report)[kind] == (count, [] if kind == "unread_columns" else expected)
    assert set(found(report)) == {kind} | WITH.get(name, set())
    assert report.train.rows == len(planted)
    twin = run_check(tokenizer, write(clean), **settings)
    assert twin.findings == [] and twin.clean and twin.train.rows == 30


def test_every_kind_of_finding_has_a_test() -> None:
    elsewhere = {
        "bos_doubled",
        "bos_missing",
        "overlap",
        "overlap_near",
        "overlap_prompt",
        "same_completions",
        "empty_side",
        "unfit",
        "wrong_kind",
        "cut_equal",
        "one_label",
        "margin_missing",
        "blank_difference",
        "length_bias",
        "nothing_left",
    }
    assert {kind for kind, _, _ in PLANTED.values()} | elsewhere == set(KINDS)


def test_all_bad_rows_are_collected_and_named(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    bad = [{"messages": i} for i in range(250)]
    path = write([*chats(3), *bad])
    (finding,) = run_check(tokenizer, path).findings
    assert finding.count == 250 and len(finding.rows) == MAX_ROWS and finding.severity == "error"
    assert finding.rows[0].row == 3 and finding.rows[0].detail == "messages is 0, not a list of messages"
    assert finding.lines()[1].startswith(f"{path} line 4 (messages is 0, not a list of messages), line 5 (")
    assert finding.lines()[1].endswith(", ...")
    (finding,) = run_check(tokenizer, path, on_bad_row="skip").findings
    assert finding.severity == "warning"


@pytest.mark.parametrize(("overlong", "severity"), [("error", "error"), ("drop", "warning"), ("truncate", "warning")])
def test_what_is_too_long_goes_by_the_policy(
    tokenizer: PreTrainedTokenizerFast, write: Write, overlong: str, severity: str
) -> None:
    path = write([*chats(5), chat(0, U, LONG), *chats(5, 10), chat(0, turn("user", "another"), LONG)])
    report = run_check(tokenizer, path, overlong=overlong, max_length=200)
    (finding,) = [f for f in report.findings if f.kind == "too_long"]
    assert (finding.severity, [p.row for p in finding.rows]) == (severity, [5, 11])
    data = DataSection(train=path, cache=False)
    whole = load_split(data.train, data, tokenizer, TEMPLATES["llama3"]).tokens
    assert finding.rows[0].detail == f"{len(whole[5]):,} tokens"
    assert len(report.train.lengths) == (12 if overlong == "truncate" else 10)
    assert report.train.lengths.max() == 200 if overlong == "truncate" else report.train.lengths.max() < 200
    assert ("terminator_missing" in found(report)) == (overlong == "truncate")


def test_text_rows(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows: list[Row] = [{"text": say(i, 30)} for i in range(25)]
    rows += [{"text": "  \n"}, {"text": ""}, {"text": "word " * 900}, rows[3]]
    report = run_check(tokenizer, write(rows), train_on="all", overlong="split", max_length=300, chat_template="auto")
    assert {f.kind: f.severity for f in report.findings}["too_long"] == "note"
    assert found(report) == {
        "too_long": (1, [28]),
        "nothing_to_train": (1, [27]),
        "empty_turn": (1, [26]),
        "repeated": (1, [29]),
        "far_longer": (1, [28]),
    }
    assert report.template == "none (raw text)"
    parsed = [{"text": "<|begin_of_text|>one two<|eot_id|>"}, {"text": "one<|begin_of_text|>two"}]
    settings: Row = {"train_on": "all", "parse_control_tokens": True, "chat_template": "auto"}
    assert found(run_check(tokenizer, write(parsed), **settings)) == {"bos_doubled": (1, [2])}
    assert found(run_check(tokenizer, write(parsed), train_on="all", chat_template="auto")) == {
        "control_text": (2, [1, 2])
    }


def test_rows_none_of_which_is_left(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    report = run_check(tokenizer, write(chats(3)), max_length=5, overlong="drop")
    assert found(report)["nothing_left"][0] == 3 and report.steps is None
    assert report.lines() and report.as_dict()["plan"] is None
    # some are left, and none of them teaches to stop, which training refuses
    rows = [chat(0, U, LONG), chat(1, turn("user", "who"), LONG)]
    report = run_check(tokenizer, write(rows), max_length=60, overlong="truncate")
    assert {f.kind: f.severity for f in report.findings}["terminator_missing"] == "error"


def test_train_on_all_looks_for_the_terminator_too(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write([*chats(3), chat(0, U, LONG)])
    for template in ("llama3", "chatml"):
        settings: Row = {"train_on": "all", "chat_template": template, "max_length": 200}
        assert found(run_check(tokenizer, path, overlong="truncate", **settings))["terminator_missing"] == (1, [4])
        assert "terminator_missing" not in found(run_check(tokenizer, path, overlong="drop", **settings))


def test_a_recipe_that_is_wrong_and_a_file_that_cannot_be_read(
    tokenizer: PreTrainedTokenizerFast, write: Write, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="raw text has no answers"):
        run_check(tokenizer, write([{"text": "x"}]))
    with pytest.raises(RecipeError, match="cuts raw text only"):
        run_check(tokenizer, write([chat(0, turn("human", "hi"), A), *chats(3)]), overlong="split")
    with pytest.raises(DataError, match="does not exist"):
        run_check(tokenizer, str(tmp_path / "absent.jsonl"))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="broken.jsonl.gz"):
        run_check(tokenizer, str(broken))


# --- BOS and terminators in ids ---------------------------------------------------------------------------------------


def test_bos_and_terminator_faults() -> None:
    def doc(*spans: Span, branches: tuple[tuple[Span, ...], ...] = ()) -> Tokens:
        return Tokens(spans, branches)

    prompt, answer = span([1, 5, 6], False), span([7, 2], True)
    good = doc(prompt, answer)
    assert bos_fault(good, 1) == "" and bos_fault(doc(span([1, 1], False), answer), 1) == "bos_doubled"
    assert bos_fault(doc(answer), 1) == "bos_missing" and bos_fault(doc(answer), None) == ""
    assert bos_fault(doc(prompt, answer, prompt, answer), 1) == ""  # Llama 2 begins every turn with one
    assert bos_fault(doc(branches=((prompt,), (answer,))), 1) == "bos_missing"
    for bad in (
        doc(prompt, span([7, 8], True)),
        doc(prompt, span([7], True), prompt, answer),
        doc(prompt, branches=((answer,), (span([7], True),))),
        doc(prompt, span([2], True), span([3], True)),
    ):
        assert lacks_terminator(bad, (2,))
    for fine in (good, doc(prompt, span([7], True, 0.5), span([2], True)), doc(prompt), doc(prompt, span([7], False))):
        assert not lacks_terminator(fine, (2,))
    assert not lacks_terminator(doc(span([7], True)), ())


# --- rows against rows ------------------------------------------------------------------------------------------------


def test_overlap_exact_near_and_by_prompt(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    train = [chat(i, turn("user", say(i, 40)), turn("assistant", say(i + 500, 40))) for i in range(200)]

    def changed(i: int, words: int) -> Row:
        """Row `i` of train with the first words of its answer replaced."""
        question, answer = (t["content"] for t in train[i]["messages"])
        new = " ".join(["replaced"] * words + answer.split()[words:])
        return chat(0, turn("user", question), turn("assistant", new))

    shouted = chat(0, *(turn(t["role"], t["content"].upper() + " ") for t in train[7]["messages"]))
    held = [changed(5, 2), *chats(4, 900), shouted, changed(9, 40), train[3], chat(0, *train[8]["messages"][:1], A)]
    report = run_check(tokenizer, write(train), eval=write(held, "eval.jsonl"))
    assert found(report) == {
        "overlap": (2, [6, 8]),
        "overlap_near": (1, [1]),
        "overlap_prompt": (3, [1, 7, 9]),
    }
    near = next(f for f in report.findings if f.kind == "overlap_near").rows[0]
    likeness = truth(*(" ".join(t["content"] for t in r["messages"]) for r in (held[0], train[5])))
    assert near.detail.endswith(f"data.jsonl line 6, {100 * likeness:.0f}% alike")
    clean = run_check(tokenizer, write(train), eval=write(chats(9, 900), "eval.jsonl"))
    assert clean.findings == [] and clean.eval is not None and clean.eval.rows == 9


def truth(a: str, b: str) -> float:
    """Jaccard similarity of two texts by sets of strings."""
    one, two = (
        {t[i : i + similar.WIDTH] for i in range(len(t) - similar.WIDTH + 1)} for t in map(similar.normalised, (a, b))
    )
    return len(one & two) / len(one | two)


def test_candidates_find_what_is_alike_and_jaccard_is_exact() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(300)]
    changed = []
    for text in texts:
        words = text.split()
        for at in rng.choice(60, 2, replace=False):
            words[at] = "other"
        changed.append(" ".join(words))
    bands = [np.stack([similar.bands(t) for t in some]) for some in (texts, changed)]
    near = similar.candidates(bands[1], bands[0])
    alike = [i for i in range(300) if truth(texts[i], changed[i]) >= similar.THRESHOLD]
    assert len(alike) > 20  # or the next line says nothing
    assert sum(i in near.get(i, []) for i in alike) >= 0.98 * len(alike)
    assert sum(map(len, near.values())) <= similar.CANDIDATES * 300
    for i in range(20):
        likeness = similar.jaccard(similar.shingles(texts[i]), similar.shingles(changed[i]))
        assert likeness == pytest.approx(truth(texts[i], changed[i]))
    assert similar.shingles("").size == 0 and not similar.bands("").any()
    assert similar.jaccard(similar.shingles("short"), similar.shingles("short")) == 1


def test_signatures_agree_as_often_as_the_sets_are_alike() -> None:
    rng = np.random.default_rng(1)
    for share in (0.3, 0.6, 0.9):
        agree = []
        for _ in range(200):
            values = rng.integers(0, 2**64, 1000, np.uint64)
            part = int(1000 * share)
            one, two = np.sort(values[: 500 + part // 2]), np.sort(values[500 - part // 2 :])
            sides = [s[np.searchsorted(s, similar._POINTS) % len(s)] for s in (one, two)]
            agree.append(float((sides[0] == sides[1]).mean()))
        assert np.mean(agree) == pytest.approx(part / 1000, abs=0.03)


def test_a_fraction_held_out_is_compared_with_the_rest(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    base = [chat(i, turn("user", say(i, 40)), turn("assistant", say(i + 500, 40))) for i in range(60)]
    twins = [chat(0, row["messages"][0], turn("assistant", row["messages"][1]["content"] + " indeed")) for row in base]
    path = write([*base, *twins])
    report = run_check(tokenizer, path, eval=0.25)
    data = DataSection(train=path, cache=False)
    train, held = holdout(load_split(data.train, data, tokenizer, TEMPLATES["llama3"]), 0.25)
    assert report.eval is not None
    assert sorted(report.eval.lengths) == sorted(len(t) for t in held.tokens)
    assert sorted(report.train.lengths) == sorted(len(t) for t in train.tokens)
    on_train = {t.row % 60 for t in train.tokens}
    torn = sum(t.row % 60 in on_train for t in held.tokens)
    assert torn > 5 and found(report)["overlap_near"][0] == torn and "overlap" not in found(report)


# --- preferences ------------------------------------------------------------------------------------------------------


def test_preferences(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    def fair(n: int) -> list[Row]:
        """Pairs of which each other one has the longer answer chosen."""
        answers = [[say(700 + i, 6), say(800 + i, 14)] for i in range(n)]
        return [pair(i, *(a if i % 2 else a[::-1])) for i, a in enumerate(answers)]

    planted = [pair(100, "the very same", "the very same"), pair(101, "one two", "one  two\n")]
    report = run_check(tokenizer, write([*fair(40), *planted]))
    assert found(report) == {"same_completions": (1, [41]), "blank_difference": (1, [42])}
    assert report.train.rows == 42 and len(report.train.lengths) == 41
    assert run_check(tokenizer, write(fair(40))).findings == []
    biased = [pair(i, say(700 + i, 14), say(800 + i, 6)) for i in range(35)] + fair(10)
    report = run_check(tokenizer, write(biased))
    lengths = [[len(tokenizer.encode(r[k], add_special_tokens=False)) for k in ("chosen", "rejected")] for r in biased]
    wins = np.mean([0.5 if a == b else float(a > b) for a, b in lengths])
    assert wins > 0.6 and report.bias is not None and report.bias.accuracy == pytest.approx(wins)
    assert found(report) == {"length_bias": (45, [])}
    assert f"preferred in {100 * wins:.1f}% of 45 comparisons" in "\n".join(report.lines())


def test_length_bias_of_unpaired_answers_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(1, 12, 300), rng.integers(1, 9, 400)
    wins = np.mean([0.5 if a == b else float(a > b) for a, b in itertools.product(good, bad)])
    bias = LengthBias.of_unpaired(good, bad)
    assert (bias.comparisons, bias.accuracy) == (120_000, pytest.approx(wins)) and bias.far
    assert not LengthBias.of_unpaired(good, good).far
    assert not LengthBias.of_pairs(np.asarray([2, 2]), np.asarray([1, 1])).far  # two pairs say nothing


def test_unpaired_rows(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [{"prompt": say(i), "completion": say(300 + i, 5 + 9 * (i % 2)), "label": bool(i % 2)} for i in range(40)]
    report = run_check(tokenizer, write(rows))
    assert report.bias is not None and report.bias.accuracy > 0.95 and "length_bias" in found(report)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "plain words, a tab\tand a\r\nline",
        "« café\u00a0», dit-il — été…\u00a0»",
        "“AMANHÔ, NÃO; „MENÜ“ – CAFÉ… ‘ÀÉ’",
        "Straße, naïve, Ærø, Þór, ½ × 2°, €5",
        "привет “мир” — 你好，世界。こんにちは 🙂",
        "zero\u200bwidth \ufeff mark, العربية",
    ],
)
def test_honest_text_has_no_sign_of_a_wrong_encoding(text: str) -> None:
    assert encoding(text) == ""


@pytest.mark.parametrize(
    "honest", ["café", "naïve", "it’s “so” – …", "привет", "你好世界", "ἀρχή", "smile 🙂", "Łódź ść"]
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_made_from_honest_text(honest: str, wrong: str) -> None:
    data = honest.encode()
    if wrong == "cp1252":
        shown = "".join(chr(b) if b in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else bytes([b]).decode(wrong) for b in data)
    else:
        shown = data.decode(wrong)
    assert encoding(shown) and not encoding(honest)


def test_script_is_that_of_most_letters() -> None:
    def name(text: str) -> str:
        return "" if script(text) == NO_SCRIPT else SCRIPTS[script(text)]

    assert (
        name("the quick brown fox jumps over") == name("1234567890 " * 40 + "twenty letters at least here") == "Latin"
    )
    assert name("где находится ближайшая библиотека ok") == "Cyrillic"
    assert name("图书馆在哪里图书馆在哪里图书馆在哪里吗") == "" == name("1 + 2 = 3")
    assert name("图书馆在哪里" * 5) == name("としょかんはどこですか" * 3) == "Han or kana"
    assert name("abcdefgh где находится") == "Cyrillic" and name("abcdefghijklm абвгдежзийклм") == ""


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_training(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path, more = (
        write(chats(37)),
        write([chat(100 + i, U, turn("assistant", "w " * i)) for i in range(1, 9)], "b.jsonl"),
    )
    sources = [{"path": path, "weight": 1.5}, {"path": more, "limit": 6}]
    report = run_check(tokenizer, sources, recipe={"num_train_epochs": 2})
    data = DataSection(train=sources, chat_template="llama3", cache=False)
    tokens = load_split(data.train, data, tokenizer, TEMPLATES["llama3"]).tokens
    sizes = [len(t) for t in tokens]
    assert report.train.lengths.tolist() == sizes and report.train.rows == 43
    assert report.train.trained == sum(t.num_trained for t in tokens)
    assert [(s.path, s.rows) for s in report.train.sources] == [(path, 37), (more, 6)]
    steps = report.steps
    assert steps is not None and steps.tokens_per_epoch == sum(sizes)
    assert steps.steps_per_epoch == -(-len(sizes) // 4) and steps.steps == 2 * steps.steps_per_epoch
    assert steps.efficiency == pytest.approx(sum(sizes) / (steps.microbatches_per_epoch * 256))
    alone = run_check(tokenizer, sources, packing=False).steps
    assert alone is not None and alone.microbatches_per_epoch == len(sizes)


def test_histogram_counts_every_sample() -> None:
    lengths = np.asarray([*range(21, 400), 5000, 7000])
    side = Side([], len(lengths), lengths, 0, {})
    bars = side.histogram()
    assert sum(n for _, _, n in bars) == len(lengths) and len(bars) <= 12 and bars[-1][1] >= 7000
    for first, last, n in bars:
        assert n == ((lengths >= first) & (lengths <= last)).sum()
    assert Side([], 1, np.asarray([7]), 0, {}).histogram() == [(7, 7, 1)]
    assert Side([], 0, np.empty(0, np.int64), 0, {}).histogram() == []


# --- brief ------------------------------------------------------------------------------------------------------------


def test_brief_lines(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, answer = span([1, 5, 6], False), span([7, 2], True)

    def sample(row: int, *spans: Span, branches: tuple[tuple[Span, ...], ...] = ()) -> Tokens:
        return Tokens(spans, branches, "a.jsonl", row)

    clean = [sample(i, prompt, span([10 + i], False), answer) for i in range(30)]
    quiet = brief(TokenStore.of(clean), None, bos=1, terminators=(2,))
    assert quiet == [f"nothing odd at a glance; {HINT}"]
    assert brief(TokenStore.of([*clean, *clean]), None, bos=1, terminators=(2,)) == quiet  # by weight, no repeat
    planted = [
        sample(30, *clean[4].trunk),
        sample(31, span([1, 1, 5], False), answer),
        sample(32, span([5], False), answer),
        sample(33, prompt, span([7, 8], True), prompt, answer),
        sample(34, prompt, span([9] * 200, False), answer),
    ]
    held = TokenStore.of([sample(0, prompt, span([99], False), answer), sample(1, *clean[9].trunk)])
    lines = brief(TokenStore.of([*clean, *planted]), held, bos=1, terminators=(2,))
    assert lines == [
        "warning: 1 of 35 samples repeat an earlier row to the token: a.jsonl line 31",
        "warning: 1 of 35 samples do not begin with BOS: a.jsonl line 33",
        "warning: 1 of 35 samples begin with two BOS: a.jsonl line 32",
        "warning: 1 of 35 samples train an answer without its terminator: a.jsonl line 34",
        "warning: 1 of 2 held-out samples are training rows too, to the token: a.jsonl line 2",
        HINT,
    ]
    pairs = [
        sample(i, prompt, branches=((span([7] * (i % 5 + 2) + [2], True),), (span([i + 20, 2], True),)))
        for i in range(40)
    ]
    (line, _) = brief(TokenStore.of(pairs), None, bos=1, terminators=(2,))
    assert line == ("warning: the longer answer is preferred in 100.0% of 40 pairs, so length nearly tells which one")
    far = TokenStore.of([*clean * 10, sample(99, prompt, span([9] * 200, False), answer)])
    assert "more than 10 times" in brief(far, None, bos=1, terminators=(2,))[0]
