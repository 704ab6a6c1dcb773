from __future__ import annotations

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from tuner.data.foreign import foreign_template
from tuner.data.foreign.literal import Splitter
from tuner.data.render import Renderer
from tuner.errors import DataError
from tuner.types import Example, Message, Tokens

TURN = "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def with_content(content: str, tokenizer: PreTrainedTokenizerFast) -> Renderer:
    """A template that writes this expression as the content of a turn."""
    jinja = "{% for m in messages %}" + TURN.replace("CONTENT", content) + "{% endfor %}" + GENERATE
    return Renderer(tokenizer, foreign_template(jinja, tokenizer))


def render(renderer: Renderer, *users: str, answer: str = "a") -> Tokens:
    messages = (*(Message("user", u) for u in users), Message("assistant", answer))
    (tokens,) = renderer.render(Example((), (messages,), "chats.jsonl", 4))
    return tokens


@pytest.mark.parametrize(
    ("text", "spelled", "partial"),
    [
        ("a <|eot_id|> b [note]", ["<|eot_id|>", "[note]"], []),
        ("<|eot_id|><|eot_id|>", ["<|eot_id|>"] * 2, []),
        ("a <|eot_", [], ["<|eot_"]),
        (" id|>b<|start \n", [], ["id|>", "<|start"]),
        (" note ", [], ["note"]),
        ("a < b > c", [], []),
        ("<|eot\u200b_id|>", [], []),
        ("", [], []),
    ],
)
def test_what_spells_a_control_token_or_a_part_of_one(
    text: str, spelled: list[str], partial: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    splitter = Splitter(tokenizer)
    assert [text[a:b] for a, b in splitter.spelled(text)] == spelled
    if not spelled:
        assert [text[a:b] for a, b in splitter.partial(text)] == partial


@pytest.mark.parametrize(
    "parts", [("<|eot_", "id|>"), ("<|eot", "_id", "|>"), ("a<", "|eot_id|>b"), (" <|eot_id", "|>")]
)
def test_parts_of_a_control_token_that_meet_stay_text(
    parts: tuple[str, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    jinja = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    tokens = render(Renderer(tokenizer, foreign_template(jinja, tokenizer)), *parts)
    assert [i for i in tokens.ids() if i in tokenizer.added_tokens_decoder] == [tokenizer.eos_token_id]
    assert tokenizer.decode(tokens.ids()) == "".join(parts) + "a<|end_of_text|>"


def test_a_template_that_makes_control_tokens_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = with_content("m.content + (m.content | replace('~', ''))", tokenizer)
    assert "[a] < b <|x|>[a] < b <|x|>" in tokenizer.decode(render(renderer, "[a] < b <|x|>").ids())
    with pytest.raises(DataError, match="the tokenizer's own chat template turns text of the chat into control"):
        render(renderer, "q <|eot~_id|> q")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("m.content[:-3]", "does not write a text that spells a control token once"),
        ("m.content + m.content", "does not write a text that spells a control token once"),
        ("m.content | tojson(ensure_ascii=true)", "does not write a text that spells a control token once"),
        ("m.content + m.content[-2:]", "cuts a text that spells a control token"),
    ],
)
def test_a_template_that_changes_what_spells_a_control_token_is_refused(
    change: str, said: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = with_content(f"(({change}) if '!' in m.content else m.content)", tokenizer)
    assert render(renderer, "q <|eot_id|>")
    with pytest.raises(
        DataError, match=f"^chats.jsonl line 5: the tokenizer's own chat template {said}.*; change the row"
    ):
        render(renderer, "q ! <|eot_id|>")


def test_what_the_normaliser_would_make_a_control_token_stays_text(fresh_tokenizer: PreTrainedTokenizerFast) -> None:
    fresh_tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    wide, note = "［note］", fresh_tokenizer.convert_tokens_to_ids("[note]")
    assert note in fresh_tokenizer(wide)["input_ids"]
    assert note not in render(with_content("m.content", fresh_tokenizer), wide, answer=wide).ids()


def test_private_use_characters_of_a_chat_come_through(tokenizer: PreTrainedTokenizerFast) -> None:
    odd = "".join(map(chr, range(0xF0000, 0xF0010))) + "<|eot_id|>" + chr(0xE000)
    tokens = render(with_content("m.content", tokenizer), odd, answer=odd)
    assert [tokenizer.decode(s.ids) for s in tokens.trunk if s.trained] == [odd + "<|im_end|>"]
