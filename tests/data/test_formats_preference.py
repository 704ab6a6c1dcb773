from __future__ import annotations

import pytest

from tuner.data.formats import parser
from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError
from tuner.types import Message

SYSTEM = {"role": "system", "content": "s"}


def user(text="q"):
    return {"role": "user", "content": text}


def answer(text="a", **more):
    return {"role": "assistant", "content": text} | more


def turns(*pairs):
    return tuple(Message(*pair) for pair in pairs)


Q, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")


def hh(*chosen, rejected):
    return {"chosen": "".join(chosen), "rejected": "".join(rejected)}


def human(text):
    return f"\n\nHuman: {text}"


def bot(text):
    return f"\n\nAssistant: {text}"


# -- hh ---------------------------------------------------------------------------------------------------------------


def test_hh_parts_dialogues_where_they_differ():
    start = human("q"), bot(" two  blanks \n\nand a paragraph\n"), human("r")
    example = parser("hh")(hh(*start, bot("a"), rejected=(*start, bot("b"))))
    assert example.prompt == turns(("user", "q"), ("assistant", " two  blanks \n\nand a paragraph\n"), ("user", "r"))
    assert example.completions == ((A,), (B,))
    assert example.label is None and example.margin is None and example.is_preference


def test_hh_with_a_prompt_of_its_own():
    whole = parser("hh")(hh(human("q"), bot("a"), rejected=(human("q"), bot("b"))))
    row = {"prompt": human("q") + "\n\nAssistant:", "chosen": " a", "rejected": " b", "response": " a"}
    assert parser("hh")(row) == whole
    assert parser("hh")({"prompt": human("q"), "chosen": bot("a"), "rejected": bot("b")}) == whole


@pytest.mark.parametrize(
    ("chosen", "rejected", "completions"),
    [
        # an empty answer is an answer, as four of the first 2,000 harmless rows have it
        (("",), ("b",), (turns(("assistant", "")), turns(("assistant", "b")))),
        # a mark inside of an answer begins another turn of the assistant
        (("a", "c"), ("b",), (turns(("assistant", "a"), ("assistant", "c")), turns(("assistant", "b")))),
        (("a", "c"), ("a",), (turns(("assistant", "a"), ("assistant", "c")), turns(("assistant", "a")))),
        # only a mark at the beginning of a paragraph is one
        (("a\nHuman: x",), ("Human: y",), (turns(("assistant", "a\nHuman: x")), turns(("assistant", "Human: y")))),
        # two equal answers are two equal answers
        (("a",), ("a",), (turns(("assistant", "a")), turns(("assistant", "a")))),
        (("a", "c"), ("a", "c"), (turns(("assistant", "c")), turns(("assistant", "c")))),
    ],
)
def test_odd_hh_rows_are_taken_as_they_are(chosen, rejected, completions):
    row = hh(human("q"), *map(bot, chosen), rejected=(human("q"), *map(bot, rejected)))
    example = parser("hh")(row)
    assert example.completions == completions
    for completion, text in zip(example.completions, (row["chosen"], row["rejected"]), strict=True):
        said = (human(m.content) if m.role == "user" else bot(m.content) for m in (*example.prompt, *completion))
        assert "".join(said) == text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (hh(human("q"), bot("a"), human("r"), rejected=(human("q"), bot("b"))), "chosen ends with a user turn"),
        (hh(human("q"), bot("a"), rejected=(human("q"), bot("b"), human("r"))), "rejected ends with a user turn"),
        (hh(human("q"), bot("a"), rejected=(human("r"), bot("b"))), "chosen and rejected go apart at message 0"),
        (
            hh(human("q"), bot("a"), bot("c"), rejected=(human("q"), bot("a"), human("r"), bot("c"))),
            "go apart at message 2, which is a user turn in rejected",
        ),
        (hh(bot("a"), rejected=(bot("b"),)), "chosen and rejected have no prompt"),
        (
            hh("What?", bot("a"), rejected=(human("q"), bot("b"))),
            "chosen begins with 'What?\\n\\nAssistant: a', not with",
        ),
        (hh("", rejected=("",)), "chosen begins with '', not with"),
        (hh(human("q"), bot("a"), rejected=()) | {"rejected": None}, "rejected is null, not a string"),
        ({"chosen": human("q") + bot("a")}, "there is no column 'rejected'"),
    ],
)
def test_hh_rows_that_are_no_pair_are_refused(row, said):
    with pytest.raises(DataError) as error:
        parser("hh")(row)
    assert said in str(error.value)


# -- preference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user()], "chosen": "a", "rejected": [answer("b")]},
        {"prompt": [user()], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"chosen": [user(), answer("a")], "rejected": [user(), answer("b")]},
        {"prompt": None, "chosen": [user(), answer("a")], "rejected": [user(), answer("b")]},
        {"prompt": "q", "chosen": [user(), answer("a")], "rejected": [user(), answer("b")]},
        {"prompt": [user()], "chosen": [user(), answer("a")], "rejected": [user(), answer("b")]},
    ],
)
def test_a_pair_in_each_of_its_shapes(row):
    example = parser("preference")(row)
    assert example.prompt == (Q,) and example.completions == ((A,), (B,))


def test_whole_conversations_share_their_longest_beginning():
    start = [SYSTEM, user(), answer("x"), user("r")]
    example = parser("preference")(
        {"chosen": [*start, answer("a")], "rejected": [*start, answer("b"), user(), answer("c")]}
    )
    assert [m.role for m in example.prompt] == ["system", "user", "assistant", "user"]
    assert example.completions == ((A,), (B, Q, Message("assistant", "c")))
    for prompt, first in (("q", 1), ("r", 0)):  # a prompt that is only the first question, or only the last
        row = {"prompt": prompt, "chosen": [*start[first:], answer("a")], "rejected": [*start[first:], answer("b")]}
        example = parser("preference")(row)
        assert example.completions == ((A,), (B,)) and len(example.prompt) == 4 - first


def test_messages_that_differ_only_in_their_arguments_are_not_shared():
    def calls(arguments):
        return answer(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])

    result = {"role": "tool", "content": "r"}
    for one, other in (
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
        ('{"a": 1}', '{"a": 1.0}'),
        ('{"a": 1}', '{"a": true}'),
    ):
        row = {"chosen": [user(), calls(one), result, answer()], "rejected": [user(), calls(other), result, answer()]}
        assert parser("preference")(row).prompt == (Q,)
        row["rejected"] = [user(), calls(one), result, answer("b")]
        assert [m.role for m in parser("preference")(row).prompt] == ["user", "assistant", "tool"]


def test_margins_and_scores():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parser("preference")(row | {"margin": 2}).margin == 2.0
    scored = parser("preference")(row | {"score_chosen": 8.5, "score_rejected": 6, "margin": None})
    assert scored.scores == (8.5, 6.0) and scored.margin == 2.5
    both = parser("preference")(row | {"score_chosen": 8, "score_rejected": 6, "margin": 0.5})
    assert both.scores == (8.0, 6.0) and both.margin == 0.5
    mapped = parser("preference", {"score_chosen": "s1", "score_rejected": "s2"})(row | {"s1": "3", "s2": "1.5"})
    assert mapped.margin == 1.5
    absent = parser("preference")(row | {"margin": "", "score_chosen": None, "score_rejected": None})
    assert absent.margin is None and absent.scores is None


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "there is no column 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a string, and there is no prompt"),
        ({"chosen": [user(), answer()], "rejected": "b"}, "rejected is a string, and there is no prompt"),
        (PAIR | {"chosen": None}, "chosen is null, not a string"),
        (PAIR | {"chosen": [user()]}, "chosen has no assistant turn"),
        (PAIR | {"chosen": [user(), answer()]}, "chosen begins with a user turn, not with an answer"),
        (PAIR | {"prompt": []}, "prompt is [], not a list of messages"),
        (
            {"chosen": [user(), answer()], "rejected": [user("r"), answer()]},
            "go apart at message 0, which is a user turn",
        ),
        (
            {"prompt": "x", "chosen": [user(), answer()], "rejected": [user(), answer("b")]},
            "prompt is neither how chosen and rejected begin nor what they answer",
        ),
        (PAIR | {"margin": "much"}, "margin is 'much'; write a number"),
        (PAIR | {"margin": True}, "margin is True; write a number"),
        (PAIR | {"margin": float("nan")}, "margin is nan; write a number"),
        (PAIR | {"score_chosen": 1}, "there is a score_chosen and no score_rejected; give both scores, or none"),
        (PAIR | {"score_chosen": 1, "score_rejected": []}, "score_rejected is []; write a number"),
    ],
)
def test_bad_pairs_are_refused(row, said):
    with pytest.raises(DataError) as error:
        parser("preference")(row)
    assert said in str(error.value)


# -- unpaired and ranked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), ("1", True), ("0", False)],
)
def test_an_unpaired_completion_is_good_or_bad(label, good):
    example = parser("unpaired")({"prompt": "q", "completion": [answer()], "label": label})
    assert example.label is good and example.is_preference
    assert example.prompt == (Q,) and example.completions == ((A,),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": None}, "label is null; write true or false"),
        ({"label": 2}, "label is 2; write true or false (or 1 or 0), or set data.format: prompt_completion"),
        ({"label": 1.0}, "label is 1.0"),
        ({"label": "good"}, "label is 'good'"),
        ({"completion": [user(), answer()]}, "completion begins with a user turn"),
        ({"completion": ""} | {"prompt": 3}, "prompt is 3, not a string"),
    ],
)
def test_bad_unpaired_rows_are_refused(change, said):
    with pytest.raises(DataError) as error:
        parser("unpaired")({"prompt": "q", "completion": "a", "label": True} | change)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("more", "order", "scores"),
    [
        ({}, "abc", None),
        ({"scores": [1, 3, 2]}, "bca", (3.0, 2.0, 1.0)),
        ({"scores": [1, 2.5, 1]}, "bac", (2.5, 1.0, 1.0)),
        ({"scores": [0, 0, 0]}, "abc", (0.0, 0.0, 0.0)),
        ({"ranks": [3, 1, 2]}, "bca", None),
        ({"ranks": [0, 2, 1], "scores": None}, "acb", None),
    ],
)
def test_ranked_completions_are_put_in_order(more, order, scores):
    example = parser("ranked")({"prompt": "q", "completions": ["a", [answer("b")], "c"]} | more)
    assert "".join(c[0].content for c in example.completions) == order
    assert example.scores == scores and example.prompt == (Q,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completions": ["a"]}, "completions is ['a'], not a list of at least two"),
        ({"completions": "ab"}, "completions is 'ab', not a list"),
        ({"completions": ["a", None]}, "completions[1] is null, not a string"),
        ({"completions": ["a", [user()]]}, "completions[1] has no assistant turn"),
        ({"scores": [1]}, "scores is [1], not a list of 2 numbers"),
        ({"scores": [1, "x"]}, "scores[1] is 'x'; write a number"),
        ({"ranks": [1, 1]}, "two completions of one rank; give scores instead"),
        ({"ranks": [1, 2], "scores": [2, 1]}, "there are scores and ranks; leave one of them out"),
    ],
)
def test_bad_ranked_rows_are_refused(change, said):
    with pytest.raises(DataError) as error:
        parser("ranked")({"prompt": "q", "completions": ["a", "b"]} | change)
    assert said in str(error.value)


def test_pairs_render_to_a_trunk_and_branches(tokenizer):
    def row(rejected):
        return hh(human("q"), bot("a"), human("r"), bot("yes"), rejected=(human("q"), bot("a"), human("r"), rejected))

    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    (sample,) = renderer.render(parser("hh")(row(bot("no"))))
    assert [[tokenizer.decode(s.ids) for s in branch if s.trained] for branch in sample.branches] == [
        ["yes<|eot_id|>"],
        ["no<|eot_id|>"],
    ]
    assert not any(s.trained for s in sample.trunk)
    with pytest.raises(DataError, match="an answer is empty, so that there is nothing to compare"):
        renderer.render(parser("hh")(row(bot(""))))


@pytest.mark.parametrize("margin", [1e308, -1e31, "1e40"])
def test_a_margin_that_32_bits_cannot_hold_is_refused(margin: object) -> None:
    with pytest.raises(DataError, match=r"margin is .*nothing larger than 1e\+30 can be computed with"):
        parser("preference")({"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin})
