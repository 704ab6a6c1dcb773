from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tuner import recipe as recipes
from tuner.data.foreign import foreign_template
from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.data.templates import as_openai
from tuner.errors import DataError, ModelError
from tuner.stages import sft
from tuner.types import Example, Message, Tokens, ToolCall

GOLDEN = Path(__file__).parents[1] / "golden"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
OWN = {
    # role markers that are text, as in Zephyr; no BOS
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "trims": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|im_end|>\n' }}{% endfor %}" + GENERATE
    ),
    "adds a system prompt": (
        "{{- bos_token -}}\n{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe good.<|im_end|>\n' -}}"
        "{%- endif -%}{%- for m in messages -%}\n{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}"
        "{%- endfor -%}" + GENERATE
    ),
    "marks answers": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}" + GENERATE
    ),
    # no generation prompt: the answer follows the prompt's last word, with a blank before it
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% elif m.role == 'user' %}{{ '[Q] ' + m.content + ' [/Q]' }}{% else %}{{ '(' + m.content + ') ' }}"
        "{% endif %}{% endfor %}"
    ),
    "dated": (
        "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '<|im_start|>system\nToday is ' + date_string + '.<|im_end|>\n' }}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE
    ),
}
ENDS = dict.fromkeys(OWN, "<|im_end|>") | {"zephyr": "<|end_of_text|>", "brackets": "<|end_of_text|>"}
BARE = {"trims": str.strip, "brackets": lambda content: " " + content}


def turns(*contents: str, system: str | None = None) -> list[Message]:
    messages = [] if system is None else [Message("system", system)]
    return messages + [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]


CHATS = [
    turns("Hello", "Hi there"),
    turns("Hello", "Hi", "And?", "Well.", system="You answer."),
    turns("  blanks \n", "a  b ", "tab\tand\r\nreturn", "x = 1\n    y = 2", "\n\nlast", "end"),
    turns("Größe 你好 🙂 e\u0301 \u00a0", "\u200bnaïve ٣٤ 🦙🏽", system="日本語"),
    turns("a < b", "[1] <| |> <|almost|>", "1", "2", ">", "<"),
]


def trl_template(name: str) -> str:
    package = importlib.util.find_spec("trl")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def make(*control: str, rstrip: bool = False, **changes: Any) -> PreTrainedTokenizerFast:
    """The golden tokenizer with further control tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "tokenizer.json"),
        **{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | changes,
    )
    tokenizer.add_tokens([AddedToken(c, special=True, rstrip=rstrip, normalized=False) for c in control])
    return tokenizer


def example(messages: Sequence[Message], prompt: int = 0, tools: Sequence[Any] = ()) -> Example:
    return Example(tuple(messages[:prompt]), (tuple(messages[prompt:]),), "chats.jsonl", 4, tuple(tools))


def mask(tokens: Tokens) -> list[bool]:
    return [s.trained for s in tokens.trunk for _ in s.ids]


def trained(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> list[str]:
    return [tokenizer.decode(s.ids) for s in tokens.trunk if s.trained]


def independently(
    tokenizer: PreTrainedTokenizerFast, jinja: str, end: str, messages: Sequence[Message], **given: Any
) -> tuple[list[int], list[bool]]:
    """Ids and mask from transformers' own renderings: each answer from its prompt's end to the next `end`."""
    rows = [as_openai(m) for m in messages]

    blanks_go = tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids(end)].rstrip

    def text(rows: list[dict[str, Any]], prompt: bool = False) -> str:
        found: str = tokenizer.apply_chat_template(
            rows, chat_template=jinja, tokenize=False, add_generation_prompt=prompt, **given
        )
        return found

    whole, ids, on, done = text(rows), list[int](), list[bool](), 0
    for i, message in enumerate(messages):
        if message.role == "assistant":
            start = len(text(rows[:i], prompt=True))
            stop = whole.index(end, start) + len(end)
            for a, b, answer in ((done, start, False), (start, stop, True)):
                part = whole[a:b].lstrip() if blanks_go and a == done and done else whole[a:b]
                new = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids, on, done = ids + new, on + [answer] * len(new), b
    rest = whole[done:].lstrip() if blanks_go else whole[done:]
    new = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids + new, on + [False] * len(new)


# -- what is rendered, and what of it is trained -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_ids_and_masks_of_unknown_templates(name: str) -> None:
    tokenizer, bare, given = make(), BARE.get(name, str), {"date_string": "26 Jul 2024"} if name == "dated" else {}
    template = foreign_template(OWN[name], tokenizer)
    renderer = Renderer(tokenizer, template)
    assert template.terminators == (ENDS[name],) and set(template.roles) >= {"system", "user", "assistant"}
    for messages in CHATS:
        (tokens,) = renderer.render(example(messages))
        ids, on = independently(tokenizer, OWN[name], ENDS[name], messages, **given)
        assert (tokens.ids(), mask(tokens)) == (ids, on)
        rows = [as_openai(m) for m in messages]
        theirs = tokenizer.apply_chat_template(rows, chat_template=OWN[name], return_dict=False, **given)
        assert tokens.ids() == theirs
        answers = [bare(m.content) + ENDS[name] for m in messages if m.role == "assistant"]
        assert trained(tokenizer, tokens) == answers
        prompt = tokenizer.apply_chat_template(
            rows[:-1], chat_template=OWN[name], add_generation_prompt=True, return_dict=False, **given
        )
        assert renderer.prompt_ids(messages[:-1]) == prompt


@pytest.mark.parametrize("name", ["zephyr", "trims", "brackets"])
def test_random_chats_are_masked_as_by_prefixes(name: str) -> None:
    tokenizer, rng = make(), random.Random(0)
    words = [
        "a",
        "the",
        " ",
        "\n",
        "12",
        ".",
        "ü",
        "🦙",
        "<|",
        "|>",
        "x = 1\n    y",
        "\u200b",
        "<",
        ">",
        "[",
        "]",
        "<|eot_",
    ]
    renderer = Renderer(tokenizer, foreign_template(OWN[name], tokenizer), max_length=10_000)
    for _ in range(150):
        contents = ["w" + "".join(rng.choices(words, k=rng.randint(0, 8))) for _ in range(2 * rng.randint(1, 3))]
        messages = turns(*contents, system=rng.choice([None, "w<"]))
        (tokens,) = renderer.render(example(messages))
        assert (tokens.ids(), mask(tokens)) == independently(tokenizer, OWN[name], ENDS[name], messages)


TRL = {
    "qwen2_5": ("<|im_end|>", ()),
    "gemma": ("<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": ("<|end_of_text|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>")),
    "lfm2_v2": ("<|im_end|>", ("<|tool_list_start|>", "<|tool_call_start|>", "<|tool_call_end|>")),
    "llama3_2": ("<|eot_id|>", ()),
    "qwen3_instruct_2507": ("<|im_end|>", ("<think>", "</think>", "<tool_call>", "</tool_call>")),
}


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("name", TRL)
def test_ids_and_masks_of_published_templates(name: str, rstrip: bool) -> None:
    """With control tokens as they are, and with ones that take the blanks after them away, as Phi-3's do."""
    (end, control), jinja = TRL[name], trl_template(name)
    tokenizer = make(*control, rstrip=rstrip)
    renderer = Renderer(tokenizer, foreign_template(jinja, tokenizer))
    given = {"date_string": "26 Jul 2024"} if name == "llama3_2" else {}
    checked = 0
    for messages in CHATS:
        system = messages[0].role == "system"
        if (name == "gemma" and system) or (name == "phi3" and len(messages) > 2 + system):
            with pytest.raises(
                DataError, match=r"chats.jsonl line 5: .*(the role 'system'|message 1 .*otherwise|message 2)"
            ):
                renderer.render(example(messages))
            continue
        (tokens,) = renderer.render(example(messages))
        rows = [as_openai(m) for m in messages]
        theirs = tokenizer.apply_chat_template(rows, chat_template=jinja, return_dict=False, **given)
        assert tokens.ids() == theirs
        assert (tokens.ids(), mask(tokens)) == independently(tokenizer, jinja, end, messages, **given)
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
@pytest.mark.parametrize("name", ["brackets", "brackets of their own"])
def test_ids_of_tokenizers_that_add_blanks(name: str, kind: str, sentencepiece: Callable[..., Any]) -> None:
    """Llama 2's kinds, with the brackets as text and as control tokens."""
    tokenizer = sentencepiece(kind, ["[Q]", "[/Q]"] if name != "brackets" else [])
    renderer = Renderer(tokenizer, foreign_template(OWN["brackets"], tokenizer))
    for messages in ([m for m in chat if m.role != "system"] for chat in CHATS):
        rows = [as_openai(m) for m in messages]
        theirs = tokenizer.apply_chat_template(rows, chat_template=OWN["brackets"], return_dict=False)
        (tokens,) = renderer.render(example(messages))
        assert tokens.ids() == theirs
        assert sum(mask(tokens)) > 0


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <of> a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_CHAT = [
    Message("user", "Weather in Oslo and Rome?"),
    Message(
        "assistant",
        "",
        tool_calls=(
            ToolCall("weather", {"city": "Oslo", "days": None}, "c1"),
            ToolCall("weather", {"city": "Rome", "n": 1.5}, "c2"),
        ),
    ),
    Message("tool", '{"c": -3}', name="weather", call_id="c1"),
    Message("tool", "18", name="weather", call_id="c2"),
    Message("assistant", "Cold and warm."),
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_tools_calls_and_results(name: str) -> None:
    (end, control), jinja = TRL[name], trl_template(name)
    tokenizer = make(*control)
    template = foreign_template(jinja, tokenizer)
    assert template.tools and "tool" in template.roles
    (tokens,) = Renderer(tokenizer, template).render(example(TOOL_CHAT, tools=TOOLS))
    rows = [as_openai(m) for m in TOOL_CHAT]
    assert tokens.ids() == tokenizer.apply_chat_template(rows, tools=TOOLS, chat_template=jinja, return_dict=False)
    assert (tokens.ids(), mask(tokens)) == independently(tokenizer, jinja, end, TOOL_CHAT, tools=TOOLS)
    calls, answer = trained(tokenizer, tokens)
    assert calls.count("<tool_call>") == 2 and '"days": null' in calls and calls.endswith("</tool_call><|im_end|>")
    assert answer == "Cold and warm.<|im_end|>"


def test_train_on_all_and_weights_of_messages() -> None:
    tokenizer = make()
    template = foreign_template(OWN["zephyr"], tokenizer)
    messages = turns("one", "two", "three", "four")
    (tokens,) = Renderer(tokenizer, template, "all").render(example(messages))
    assert mask(tokens) == [True] * len(tokens)
    messages[2] = dataclasses.replace(messages[2], train=False)
    (tokens,) = Renderer(tokenizer, template, "all").render(example(messages))
    assert trained(tokenizer, tokens) == [
        "<|user|>\none<|end_of_text|>\n<|assistant|>\ntwo<|end_of_text|>\n",
        "<|assistant|>\nfour<|end_of_text|>\n",
    ]
    (tokens,) = Renderer(tokenizer, template, "last").render(example(turns("one", "two", "three", "four")))
    assert trained(tokenizer, tokens) == ["four<|end_of_text|>"]


def test_pairs_share_their_prompt() -> None:
    tokenizer = make()
    template = foreign_template(OWN["trims"], tokenizer)
    chosen, rejected = (Message("assistant", c) for c in ("good", "bad"))
    pair = Example((Message("user", "q"),), ((chosen,), (rejected,)))
    (tokens,) = Renderer(tokenizer, template).render(pair)
    prompt = Renderer(tokenizer, template).prompt_ids(pair.prompt)
    assert [i for s in tokens.trunk for i in s.ids] == prompt
    assert [tokenizer.decode([i for s in b for i in s.ids if s.trained]) for b in tokens.branches] == [
        "good<|im_end|>",
        "bad<|im_end|>",
    ]


def test_auto_renders_an_unknown_template_and_saves_it_unchanged(fresh_tokenizer: PreTrainedTokenizerFast) -> None:
    fresh_tokenizer.chat_template = OWN["zephyr"]
    template = resolve_template("auto", fresh_tokenizer)
    assert template.name == "own" and template.saved() == OWN["zephyr"]
    fresh_tokenizer.chat_template = template.saved()
    assert resolve_template("auto", fresh_tokenizer).terminators == ("<|end_of_text|>",)


META = trl_template("llama3")


@pytest.mark.parametrize(
    ("old", "new"),
    [("\n\n", "\n"), ("| trim ", ""), ("<|eot_id|>", "<|eom_id|>"), ("'+ message", "' + ' ' + message")],
)
def test_auto_follows_a_template_that_differs_from_one_we_know(
    old: str, new: str, fresh_tokenizer: PreTrainedTokenizerFast
) -> None:
    changed = META.replace(old, new)
    assert changed != META
    fresh_tokenizer.chat_template = changed
    template = resolve_template("auto", fresh_tokenizer)
    assert template.name == "own"
    rows = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    (tokens,) = Renderer(fresh_tokenizer, template).render(example(turns(" a ", "b")))
    assert tokens.ids() == fresh_tokenizer.apply_chat_template(rows, return_dict=False)


def test_a_run_keeps_an_unknown_template(recipe_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    changed = META.replace("\n\n", "\n")
    base = AutoTokenizer.from_pretrained(tiny_model_dir)
    base.chat_template = changed
    base.save_pretrained(tiny_model_dir)
    sft.run(recipes.load(recipe_file, ["data.chat_template=auto", "train.max_steps=1"], stage="sft"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert saved.chat_template == changed
    assert resolve_template("auto", saved).name == "own"


# -- what is refused, by name ------------------------------------------------------------------------------------------

REFUSED = {
    "another header": (
        "{% for m in messages %}"
        + TURN
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>bot\n' }}{% endif %}",
        r"beginning of message 1 \(assistant\) otherwise than its generation prompt",
    ),
    "no end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "does not end message 1 .* with a control token .* never learn to stop",
    ),
    "an end of another tokenizer": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "with a control token of this tokenizer",
    ),
    "text after the end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|> over' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "does not end message 1",
    ),
    "no generation prompt": ("{% for m in messages %}" + TURN + "{% endfor %}", "has no generation prompt"),
    "today": (
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE,
        "asks for strftime_now, today's date",
    ),
    "today, in prompts only": (
        "{% for m in messages %}"
        + TURN
        + "{% endfor %}{% if add_generation_prompt %}{{ strftime_now('%d') }}{% endif %}",
        "asks for strftime_now, today's date",
    ),
    "chance": ("{{ ['a', 'b'] | random }}{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE, "random filter"),
    "not Jinja": ("{% for m in messages %}{{ m.content }", "fails: .*unexpected '}'"),
    "drops users": (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + TURN + "{% endif %}{% endfor %}" + GENERATE,
        r"does not write the content of message 0 \(user\)",
    ),
    "upper case": (
        "{% for m in messages %}" + TURN.replace("m['content']", "m.content | upper") + "{% endfor %}" + GENERATE,
        "does not write",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_mask_is_not_exact_is_refused(name: str) -> None:
    jinja, said = REFUSED[name]
    tokenizer = make()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ModelError, match=rf"^the chat template of some/model .*{said}.*; set data.chat_template"):
        foreign_template(jinja, tokenizer)


THINKS = (
    "{% for m in messages %}{% set said = m.content %}{% if '</think>' in said and not loop.last %}"
    "{% set said = said.split('</think>')[-1] | trim %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}" + GENERATE
)


def test_old_reasoning_that_is_stripped_is_refused_where_there_is_any() -> None:
    tokenizer = make()
    template = foreign_template(THINKS, tokenizer)
    renderer = Renderer(tokenizer, template)
    (tokens,) = renderer.render(example(turns("q", "<think>\nhm\n</think>\n\na")))
    assert trained(tokenizer, tokens) == ["<think>\nhm\n</think>\n\na<|im_end|>"]
    assert renderer.render(example(turns("q", "a", "q", "<think>hm</think>a")))
    with pytest.raises(
        DataError, match=r"^chats.jsonl line 5: .* the content of message 1 .*; change the row, or set data.c"
    ):
        renderer.render(example(turns("q", "<think>hm</think>a", "q", "a")))
    # what a model is asked to go on from is not trained on
    prompt = turns("q", "<think>hm</think>a", "q")
    with pytest.raises(DataError, match="does not write the content of message 1"):
        renderer.prompt_ids(prompt)


def test_a_row_that_the_template_refuses_is_named() -> None:
    tokenizer = make()
    jinja = (
        "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('No x!') }}{% endif %}"
        + TURN
        + "{% endfor %}"
    )
    renderer = Renderer(tokenizer, foreign_template(jinja + GENERATE, tokenizer))
    assert renderer.render(example(turns("q", "a")))
    with pytest.raises(
        DataError, match="chats.jsonl line 5: the tokenizer's own chat template refuses the chat: No x!"
    ):
        renderer.render(example(turns("q", "xa")))


def test_parts_of_a_chat_that_a_template_would_drop_are_refused() -> None:
    tokenizer = make()
    drops_calls = foreign_template(OWN["trims"], tokenizer)
    assert not drops_calls.tools
    with pytest.raises(DataError, match="which chat_template 'own' has no place for"):
        Renderer(tokenizer, drops_calls).render(example(TOOL_CHAT, tools=TOOLS))
    first_only = trl_template("qwen2_5").replace(
        "for tool_call in message.tool_calls", "for tool_call in message.tool_calls[:1]"
    )
    renderer = Renderer(tokenizer, foreign_template(first_only, tokenizer))
    assert renderer.render(example([*TOOL_CHAT[:1], TOOL_CHAT[4]], tools=TOOLS))
    with pytest.raises(DataError, match="does not write each tool call"):
        renderer.render(example(TOOL_CHAT, tools=TOOLS))
    no_system = make("<start_of_turn>", "<end_of_turn>")
    with pytest.raises(
        DataError, match="the role 'system', which chat_template 'own' does not know; allowed: user, assis"
    ):
        Renderer(no_system, foreign_template(trl_template("gemma"), no_system)).render(example(CHATS[1]))


def test_an_unusual_end_is_refused() -> None:
    tokenizer = make()
    jinja = "{% for m in messages %}" + TURN.replace(
        "'<|im_end|>\n'", "('<|eot_id|>' if m.content == 'odd' else '<|im_end|>') + '\n'"
    )
    renderer = Renderer(tokenizer, foreign_template(jinja + "{% endfor %}" + GENERATE, tokenizer))
    with pytest.raises(
        DataError, match=r"ends message 1 \(assistant\) with <\|eot_id\|>, and other answers with another"
    ):
        renderer.render(example(turns("q", "odd")))
