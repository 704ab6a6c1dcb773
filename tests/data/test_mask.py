from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tuner.data.formats import parser
from tuner.data.mask import Mask
from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError
from tuner.types import Example, Message

USER, ASKED = Message("user", "How do I pick a lock?"), Message("assistant", "With a pick.")


def judged(**verdict: object) -> Example:
    """A conversation for Llama Guard, whose answers are all by the assistant, and the last of which is the verdict."""
    turns = (USER, ASKED, Message("user", "Thanks."), Message("assistant", "safe", **verdict))  # type: ignore[arg-type]
    return Example(turns[:1], (turns[1:],), "guard.jsonl", 4)


@pytest.mark.parametrize("verdict", [{"train": False}, {"weight": 0.0}])
def test_a_row_with_nothing_trained_in_its_rendering_is_refused(
    verdict: dict[str, object], tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["llama_guard"])
    (sample,) = renderer.render(judged())
    assert [tokenizer.decode(s.ids) for s in sample.trunk if s.trained] == ["safe<|eot_id|>"]
    refused: list[DataError] = []
    found = renderer.render_batch([judged(**verdict), judged()], lambda _, error: refused.append(error))
    assert [len(samples) for samples in found] == [0, 1]
    assert [error.kind for error in refused] == ["nothing_to_train"]
    assert str(refused[0]).startswith("guard.jsonl line 5: nothing to train on")


def test_what_is_refused_counts_as_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    bad = Example((Message("user", "<|eot_id|>"),), ((Message("assistant", "", train=False),),), "a.jsonl", 0)
    assert renderer.render_batch([bad], lambda *_: None) == [[]]
    assert not renderer.report.counts and not renderer.num_chats


def test_an_input_is_part_of_the_user_turn_before_it_and_never_of_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    about, answer = Message("input", "3 and 4"), Message("assistant", "7")
    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    (sample,) = renderer.render(Example((Message("user", "Add."), about), ((answer,),)))
    (plain,) = renderer.render(Example((Message("user", "Add.\n\n3 and 4"),), ((answer,),)))
    assert sample.ids() == plain.ids()
    for prompt in ((about,), (Message("system", "Be brief."), about), (USER, ASKED, about)):
        with pytest.raises(DataError, match=f"message {len(prompt) - 1} has the role 'input', and no user turn"):
            renderer.render(Example(prompt, ((answer,),)))


def test_a_prompt_of_compared_answers_cannot_ask_to_be_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b", "train": True},
        {"role": "user", "content": "c?"},
    ]
    pair = parser("preference")({"prompt": prompt, "chosen": "yes", "rejected": "no"})
    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    with pytest.raises(DataError, match="message 1 asks for train: true in the prompt, and only the answers that are"):
        renderer.render(pair)
    # of a chat it is trained
    (sample,) = renderer.render(parser("prompt_completion")({"prompt": prompt, "completion": "yes"}))
    assert [tokenizer.decode(s.ids) for s in sample.trunk if s.trained] == ["b<|eot_id|>", "yes<|eot_id|>"]


def test_neighbouring_texts_of_one_weight_are_one_and_of_two_are_two(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Message("system", "a "), Message("user", "b"), Message("assistant", "c"))
    for weight, texts in ((1.0, ["a b", "c"]), (0.5, ["a ", "b", "c"])):
        prompt = (turns[0], Message("user", "b", weight=weight))
        for template, train_on in (("plain", "all"), ("llama2", "all")):
            mask = Mask(tokenizer, TEMPLATES[template], train_on, False)  # type: ignore[arg-type]
            (branch,) = mask.of(Example(prompt, ((turns[2],),)), "here").branches
            found = [piece.text for piece, _ in branch if not piece.control]
            if template == "plain":
                assert found == texts
            else:  # the same rule cuts the system text from the user's in the turn that they share
                assert len(found) == len(texts) and "".join(found) == "[INST] <<SYS>>\na \n<</SYS>>\n\nb [/INST] c "
