from __future__ import annotations

from dataclasses import replace

import pytest

from tuner.data import ghost
from tuner.data.formats import parser
from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError
from tuner.types import Example, Message

SAY = "Answer in rhyme."


def user(text):
    return Message("user", text)


def bot(text, **more):
    return Message("assistant", text, **more)


SYSTEM = Message("system", f" {SAY}\n")
DIALOGUE = (SYSTEM, user("one"), bot("a1"), user("two"), bot("a2"), user("three"), bot("a3"))


def example(messages):
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    return Example(tuple(messages[:first]), (tuple(messages[first:]),))


def trained_texts(tokenizer, messages, **settings):
    (sample,) = Renderer(tokenizer, TEMPLATES["llama3"], **settings).render(example(messages))
    text = tokenizer.decode(sample.ids())
    return text, [tokenizer.decode(s.ids) for s in sample.trunk if s.trained]


def test_the_instruction_is_repeated_in_every_user_turn_and_taken_out_again():
    said = ghost.repeated(DIALOGUE)
    assert [m.content for m in said if m.role == "user"] == [f"{SAY}\n\n{n}" for n in ("one", "two", "three")]
    assert [m for m in said if m.role != "user"] == [m for m in DIALOGUE if m.role != "user"]
    assert ghost.once(said, SAY) == DIALOGUE
    blanks = (SYSTEM, user("  x\n"), bot("a"), user(""), bot("b"), user("\n\n"))
    assert ghost.once(ghost.repeated(blanks), SAY) == blanks


def test_without_an_instruction_nothing_happens():
    for messages in ((user("one"), bot("a")), (Message("system", " \n"), user("one"), bot("a"), user("two"), bot("b"))):
        assert ghost.repeated(messages) == messages
        assert ghost.trained(example(messages)) == example(messages)


def test_words_of_the_user_that_only_look_like_the_instruction_stay():
    for text in (SAY, f"{SAY} Please.", f"{SAY}\nnow", "Answer", f"x\n\n{SAY}\n\ny"):
        assert ghost.once((user(text),), SAY) == (user(text),)
    assert ghost.once((user(f"{SAY}\n\nnow"), bot(f"{SAY}\n\nnow")), SAY) == (user("now"), bot(f"{SAY}\n\nnow"))


def test_only_the_last_turn_is_trained_and_the_instruction_stands_once(tokenizer):
    plain, all_answers = trained_texts(tokenizer, DIALOGUE)
    assert all_answers == ["a1<|eot_id|>", "a2<|eot_id|>", "a3<|eot_id|>"]
    for messages in (DIALOGUE, ghost.repeated(DIALOGUE)):
        text, trained = trained_texts(tokenizer, messages, ghost_attention=True)
        assert trained == ["a3<|eot_id|>"]
        assert text == plain and text.count(SAY) == 1
    assert trained_texts(tokenizer, ghost.repeated(DIALOGUE))[0].count(SAY) == 4


def test_the_mask_is_exact_to_the_token(tokenizer):
    renderer = Renderer(tokenizer, TEMPLATES["llama3"], ghost_attention=True)
    (sample,) = renderer.render(example(ghost.repeated(DIALOGUE)))
    mask = [s.trained for s in sample.trunk for _ in s.ids]
    prompt = renderer.prompt_ids(DIALOGUE[:-1])
    answer = [*tokenizer.encode("a3", add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert sample.ids() == [*prompt, *answer]
    assert mask == [False] * len(prompt) + [True] * len(answer)


def test_the_last_turn_may_have_several_messages(tokenizer):
    messages = (*DIALOGUE[:-1], bot("I look"), Message("tool", "rain"), bot("a3"))
    silenced = ghost.trained(example(messages)).completions[0]
    assert [m.train for m in silenced if m.role == "assistant"] == [False, False, None, None]
    _, trained = trained_texts(tokenizer, (*DIALOGUE, bot("a4")), ghost_attention=True)
    assert trained == ["a3<|eot_id|>", "a4<|eot_id|>"]
    # a question without an answer begins no turn that could be trained
    _, trained = trained_texts(tokenizer, (*DIALOGUE, user("four")), ghost_attention=True)
    assert trained == ["a3<|eot_id|>"]


def test_a_message_that_says_train_itself_keeps_it(tokenizer):
    messages = tuple(replace(m, train=True, weight=0.5) if m.content == "a1" else m for m in DIALOGUE)
    _, trained = trained_texts(tokenizer, messages, ghost_attention=True)
    assert trained == ["a1<|eot_id|>", "a3<|eot_id|>"]
    silent = tuple(replace(m, train=False) if m.content == "a3" else m for m in DIALOGUE)
    with pytest.raises(DataError, match="nothing to train on"):
        trained_texts(tokenizer, silent, ghost_attention=True)


def test_train_on_last_trains_no_more_than_it_says(tokenizer):
    _, trained = trained_texts(tokenizer, (*DIALOGUE, bot("a4")), ghost_attention=True, train_on="last")
    assert trained == ["a4<|eot_id|>"]


def test_dialogues_of_one_turn_and_pairs_keep_their_answers(tokenizer):
    _, trained = trained_texts(tokenizer, (SYSTEM, user("one"), bot("a1")), ghost_attention=True)
    assert trained == ["a1<|eot_id|>"]
    said = [{"role": m.role, "content": m.content} for m in ghost.repeated(DIALOGUE)]
    row = {"chosen": said, "rejected": [*said[:-1], {"role": "assistant", "content": "b"}]}
    (sample,) = Renderer(tokenizer, TEMPLATES["llama3"], ghost_attention=True).render(parser("preference")(row))
    assert tokenizer.decode(sample.ids()).count(SAY) == 1 and not any(s.trained for s in sample.trunk)
    found = [tokenizer.decode(s.ids) for branch in sample.branches for s in branch if s.trained]
    assert found == ["a3<|eot_id|>", "b<|eot_id|>"]


def test_dialogues_without_an_instruction_are_counted(tokenizer):
    renderer = Renderer(tokenizer, TEMPLATES["llama3"], ghost_attention=True)
    renderer.render_batch([example(DIALOGUE), replace(example(DIALOGUE[1:]), source="a.jsonl", row=6)])
    assert renderer.report.counts["no_instruction"].places == ["a.jsonl line 7"]
    assert "1 rows without a system instruction, which data.ghost_attention leaves as they are: a.jsonl line 7" in (
        renderer.report.lines()
    )
    plain = Renderer(tokenizer, TEMPLATES["llama3"])
    plain.render(example(DIALOGUE[1:]))
    assert not plain.report.counts
