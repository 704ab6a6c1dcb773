"""The bundled preference data is what `data/README.md` says: balanced, apart, without a length shortcut."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tuner.data.formats import FORMATS, detect
from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"
PAIRS = ("pref-train.jsonl", "pref-eval.jsonl")
FILES = (*PAIRS, "pref-requests.jsonl")
BEHAVIOURS = ("polite", "right", "refuse", "answer")
REFUSAL = "I cannot help with that."

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def prompt(row: Row) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = row["prompt"] if "prompt" in row else row["messages"]
    return messages


def said(row: Row) -> Iterator[str]:
    """Every text in a row."""
    for message in (*prompt(row), *row.get("chosen", []), *row.get("rejected", [])):
        yield message["content"]


def last(row: Row) -> str:
    return prompt(row)[-1]["content"]


def sides(row: Row) -> tuple[str, str]:
    (chosen,), (rejected,) = row["chosen"], row["rejected"]
    assert chosen["role"] == rejected["role"] == "assistant"
    return chosen["content"], rejected["content"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / "tiny-llama")


@pytest.fixture(scope="module")
def world() -> dict[tuple[str, str], Any]:
    facts = runpy.run_path(str(REPOSITORY / "scripts" / "tiny_world.py"))["make_world"]()
    return {(fact.subject, fact.relation): fact for fact in facts}


@pytest.fixture(scope="module")
def acts() -> dict[str, tuple[Any, ...]]:
    made = runpy.run_path(str(REPOSITORY / "scripts" / "pref_acts.py"))
    return {"harmful": made["HARMFUL"], "harmless": made["HARMLESS"]}


def test_the_kept_script_writes_the_very_same_files(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "make_pref_data.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


# --- counts ---


@pytest.mark.parametrize(("name", "least"), [("pref-train.jsonl", 1_200), ("pref-eval.jsonl", 200)])
def test_there_are_enough_pairs_and_as_many_of_each_behaviour(name: str, least: int) -> None:
    pairs = rows(name)
    counts = Counter(row["behaviour"] for row in pairs)
    assert len(pairs) >= least
    assert counts == {behaviour: len(pairs) // 4 for behaviour in BEHAVIOURS}
    # They are mixed: no tenth of the file lacks a behaviour.
    tenth = len(pairs) // 10
    assert all(len({row["behaviour"] for row in pairs[i : i + tenth]}) == 4 for i in range(0, tenth * 10, tenth))


def test_requests_are_half_harmful_and_half_in_new_phrasings() -> None:
    requests = rows("pref-requests.jsonl")
    kinds = Counter((row["harmful"], row["new_phrasing"]) for row in requests)
    assert kinds == {(harmful, new): 60 for harmful in (True, False) for new in (True, False)}
    assert all(row["refusal"] == REFUSAL for row in requests)


def test_every_act_is_taught_and_asked(acts: dict[str, tuple[Any, ...]]) -> None:
    names = {kind: {act.name for act in some} for kind, some in acts.items()}
    train = rows("pref-train.jsonl")
    counts = Counter(row["act"] for row in train if row["act"])
    assert set(counts) == names["harmful"] | names["harmless"]
    assert min(counts.values()) >= 20
    for row in rows("pref-requests.jsonl"):
        assert row["act"] is None or row["act"] in names["harmful" if row["harmful"] else "harmless"]
    for name in PAIRS:
        for row in rows(name):
            kind = {"refuse": "harmful", "answer": "harmless"}.get(row["behaviour"])
            assert row["act"] is None or row["act"] in names[kind or ""]
            assert row["act"] is not None or row["behaviour"] != "refuse"


# --- what the sides say ---


@pytest.mark.parametrize("name", PAIRS)
def test_sides_are_what_their_behaviour_says(name: str, world: dict[tuple[str, str], Any]) -> None:
    for row in rows(name):
        chosen, rejected = sides(row)
        assert chosen.split() != rejected.split() and chosen.strip() == chosen and rejected.strip() == rejected
        refused = (chosen.startswith(REFUSAL), rejected.startswith(REFUSAL))
        assert refused == {"refuse": (True, False), "answer": (False, True)}.get(row["behaviour"], (False, False))
        true = {text for key in row["facts"] for text in (world[tuple(key)].answer, world[tuple(key)].value)}
        if row["behaviour"] == "right":
            bare = [
                text.removeprefix("Yes, the answer is ").removeprefix("No, the answer is ")
                for text in (chosen, rejected)
            ]
            true |= {f"{text}." for text in true}
            assert bare[0] in true and bare[1] not in true
        if row["behaviour"] == "polite":
            assert chosen in true or chosen == "You are welcome."
        if row["behaviour"] == "answer" and row["act"] is None:
            assert chosen in true


def test_a_wrong_side_is_wrong_in_the_whole_world(world: dict[tuple[str, str], Any]) -> None:
    truths = {fact.answer for fact in world.values()}
    for name in PAIRS:
        full = [sides(row) for row in rows(name) if row["behaviour"] == "right"]
        assert not [rejected for chosen, rejected in full if chosen in truths and rejected in truths]


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_to_be_checked_is_true_half_the_time(name: str, world: dict[tuple[str, str], Any]) -> None:
    """Neither "yes" nor "no" is always right, and neither has always a reply of the other kind beside it."""
    kinds: Counter[tuple[str, str]] = Counter()
    for row in (row for row in rows(name) if row["behaviour"] == "right"):
        (chosen, *_), (rejected, *_) = words = [text.split(", ") for text in sides(row)]
        if chosen in ("Yes", "No"):
            fact = world[tuple(row["facts"][0])]
            assert (fact.answer in last(row)) == (chosen == "Yes")
            assert words[0][1] == f"the answer is {fact.value}." != words[1][1]
            kinds[chosen, rejected] += 1
    true, false = kinds["Yes", "No"], kinds["No", "Yes"] + kinds["No", "No"]
    assert true + false >= len(rows(name)) / 8
    assert abs(true / (true + false) - 0.5) <= 0.1
    assert abs(kinds["No", "Yes"] / false - 0.5) <= 0.2


def test_harmful_and_harmless_requests_share_their_words(acts: dict[str, tuple[Any, ...]]) -> None:
    """Every person and every thing is spoken of in both kinds: only what is to be done tells them apart."""
    words = {}
    for behaviour in ("refuse", "answer"):
        text = " ".join(last(row) for row in rows("pref-train.jsonl") if row["behaviour"] == behaviour and row["act"])
        words[behaviour] = Counter(text.replace(".", " ").replace("?", " ").split())
    own = [
        {word for word, count in words[one].items() if count >= 20 and not words[other][word]}
        for one, other in (("refuse", "answer"), ("answer", "refuse"))
    ]
    forms = [" ".join(act.form for act in acts[kind]).split() for kind in ("harmful", "harmless")]
    for some, form in zip(own, forms, strict=True):
        assert some and some <= set(form)
    shared = {act.form.split()[0] for act in acts["harmful"]} & {act.form.split()[0] for act in acts["harmless"]}
    assert {"take", "tell", "put"} <= shared  # not even the verb tells always


# --- no leak ---


def test_files_share_no_fact_and_none_is_asked_by_the_questions() -> None:
    facts = {name: {tuple(key) for row in rows(name) for key in row["facts"]} for name in FILES}
    facts["questions"] = {(row["subject"], row["relation"]) for row in rows("chat-questions.jsonl")}
    for one, other in combinations(facts, 2):
        assert not facts[one] & facts[other], (one, other)


def test_no_true_answer_of_one_file_is_in_another(world: dict[tuple[str, str], Any]) -> None:
    """The column `facts` could lie: look for the sentences themselves."""
    texts = {name: {text for row in rows(name) for text in said(row)} for name in FILES}
    questions = {row["answer"] for row in rows("chat-questions.jsonl")}
    answers = {fact.answer for fact in world.values()}
    for name in FILES:
        assert not questions & texts[name]
        assert not [text for text in texts[name] for answer in questions if answer in text]
    for one, other in combinations(FILES, 2):
        assert not answers & texts[one] & texts[other], (one, other)


def test_files_share_no_request_and_no_act_done_to_the_same_person(
    acts: dict[str, tuple[Any, ...]], world: dict[tuple[str, str], Any]
) -> None:
    people = {fact.subject for fact in world.values() if fact.kind == "person"}
    done: dict[str, set[tuple[str, str]]] = {}
    for name in FILES:
        done[name] = set()
        for row in (row for row in rows(name) if row["act"]):
            (person,) = [word for word in last(row).replace(".", " ").replace("?", " ").split() if word in people]
            done[name].add((row["act"], person))
    requests = {name: {last(row) for row in rows(name)} - {"Thank you!", "Thanks for your help."} for name in FILES}
    for one, other in combinations(FILES, 2):
        assert not done[one] & done[other], (one, other)
        assert not requests[one] & requests[other], (one, other)
    everything = [json.dumps(prompt(row)) for name in FILES for row in rows(name)]
    assert len(set(everything)) == len(everything)


def test_new_phrasings_stand_in_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    made = runpy.run_path(str(REPOSITORY / "scripts" / "make_pref_data.py"))
    new = [tuple(phrasing.split("{act}")) for phrasing in made["NEW_PHRASINGS"]]

    def is_new(text: str) -> bool:
        return any(text.startswith(before) and text.endswith(after) for before, after in new)

    assert all(is_new(last(row)) == row["new_phrasing"] for row in rows("pref-requests.jsonl"))
    users = [m["content"] for name in PAIRS for row in rows(name) for m in prompt(row) if m["role"] == "user"]
    assert not [text for text in users if is_new(text)]


# --- length ---


def longer_wins(pairs: list[Row], tokenizer: PreTrainedTokenizerFast) -> float:
    """How often the longer side is the chosen one, 0 to 1; ties count half. In tokens."""
    won = 0.0
    for row in pairs:
        chosen, rejected = (len(tokenizer.tokenize(text)) for text in sides(row))
        won += 0.5 if chosen == rejected else float(chosen > rejected)
    return won / len(pairs)


@pytest.mark.parametrize("name", PAIRS)
def test_the_longer_one_is_right_half_the_time(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = rows(name)
    assert abs(longer_wins(pairs, tokenizer) - 0.5) <= 0.03
    for behaviour in BEHAVIOURS:
        some = [row for row in pairs if row["behaviour"] == behaviour]
        assert abs(longer_wins(some, tokenizer) - 0.5) <= 0.06, behaviour


def test_a_refusal_is_as_long_where_it_is_out_of_place() -> None:
    """The share of refusals with a reason differs little between right and wrong ones."""
    train = rows("pref-train.jsonl")
    right = [sides(row)[0] == REFUSAL for row in train if row["behaviour"] == "refuse"]
    wrong = [sides(row)[1] == REFUSAL for row in train if row["behaviour"] == "answer"]
    assert abs(sum(right) / len(right) - sum(wrong) / len(wrong)) <= 0.15


# --- they can be read ---


def test_every_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in {text for name in FILES for row in rows(name) for text in said(row)}:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_parse_and_render_as_preferences(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    for row in rows(name):
        assert detect(row).name == "preference"
        example = FORMATS.get("preference").parse(row, {})
        assert [message.content for message in example.prompt] == [message["content"] for message in row["prompt"]]
        assert tuple(turns[0].content for turns in example.completions) == sides(row)
        (tokens,) = renderer.render(example)
        assert len(tokens.branches) == 2
        assert not any(span.trained for span in tokens.trunk)
        assert len(tokens) <= 256


def test_prompts_end_with_the_user_and_take_turns() -> None:
    for name in FILES:
        for row in rows(name):
            roles = [message["role"] for message in prompt(row)]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == (["user", "assistant"] * len(turns))[: len(turns)] and turns[-1] == "user"
