from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tuner.data.encode import TextEncoder
from tuner.data.render import Renderer
from tuner.data.templates import BOS, EOS, TEMPLATES, fingerprint, resolve_template
from tuner.errors import ModelError, RecipeError
from tuner.types import Example, Message

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    (path.stem.removeprefix("chats_"), chat)
    for path in sorted(GOLDEN.glob("chats_*.json"))
    for chat in json.loads(path.read_text(encoding="utf-8"))
]
META_FIRST = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def turns(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


HARMLESS = [
    turns("Hello", "Hi there"),
    turns("Hello"),
    turns("Hello", "Hi", "And?", system="You answer."),
    turns("  blanks \n", "a  b", "tab\tand\r\nreturn", "x = 1\n    y = 2", "\n\nlast"),
    turns("Größe 你好 🙂 e\u0301 \u00a0", "\u200bnaïve ٣٤ 🦙🏽", system="日本語"),
    turns("", "", "", system=""),
    turns("1234567 is 7 digits", "12,345.67", "don't WE'LL", "<|almost|> a <b> | c"),
]


def as_messages(rows):
    return [Message(row["role"], row["content"], row.get("train"), row.get("weight", 1.0)) for row in rows]


def text_of(template, tokenizer, messages, add_generation_prompt=False):
    names = {BOS: tokenizer.bos_token, EOS: tokenizer.eos_token}
    return "".join(
        names.get(p.text, p.text) if p.control else p.text for p in template.pieces(messages, add_generation_prompt)
    )


@pytest.mark.parametrize(("name", "chat"), CASES, ids=[f"{n}-{c['name']}" for n, c in CASES])
def test_golden(name, chat, tokenizer):
    template, messages = TEMPLATES[name], as_messages(chat["messages"])
    text = chat["text"].replace("«", "").replace("»", "")
    assert text_of(template, tokenizer, messages) == text
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    example = Example(tuple(messages[:first]), (tuple(messages[first:]),))
    (tokens,) = Renderer(tokenizer, template, chat["train_on"]).render(example)
    assert tokens.ids() == chat["ids"]
    assert [int(s.trained) for s in tokens.trunk for _ in s.ids] == chat["mask"]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("chat", HARMLESS)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_jinja_renders_the_text_of_the_pieces(name, chat, generate, tokenizer):
    template = TEMPLATES[name]
    text = tokenizer.apply_chat_template(
        chat, chat_template=template.jinja, tokenize=False, add_generation_prompt=generate
    )
    assert text_of(template, tokenizer, as_messages(chat), generate) == text


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("chat", HARMLESS)
@pytest.mark.parametrize("name", ["llama3", "chatml"])
def test_ids_equal_apply_chat_template(name, chat, generate, tokenizer):
    template, messages = TEMPLATES[name], as_messages(chat)
    theirs = tokenizer.apply_chat_template(
        chat, chat_template=template.jinja, add_generation_prompt=generate, return_dict=False
    )
    renderer = Renderer(tokenizer, template, "all")
    if generate:
        assert renderer.prompt_ids(messages) == theirs
    else:
        (tokens,) = renderer.render(Example(tuple(messages), ((),)))
        assert tokens.ids() == theirs


@pytest.mark.parametrize("chat", [c for c in HARMLESS if c[-1]["role"] == "user"])
def test_plain_prompts_equal_apply_chat_template(chat, tokenizer):
    plain = TEMPLATES["plain"]
    theirs = tokenizer.apply_chat_template(
        chat, chat_template=plain.jinja, add_generation_prompt=True, return_dict=False
    )
    assert Renderer(tokenizer, plain).prompt_ids(as_messages(chat)) == theirs


def _meta_template() -> str:
    """Meta's text as the installed `trl` package carries it."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.submodule_search_locations
    return (Path(package.submodule_search_locations[0]) / "chat_templates" / "llama3.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("chat", HARMLESS)
def test_llama3_renders_as_metas_own_template(chat, generate, tokenizer):
    ours, theirs = (
        tokenizer.apply_chat_template(chat, chat_template=t, tokenize=False, add_generation_prompt=generate)
        for t in (TEMPLATES["llama3"].jinja, _meta_template())
    )
    assert ours == theirs


def test_auto_recognises_our_own_and_metas_templates(fresh_tokenizer):
    for name, template in TEMPLATES.items():
        fresh_tokenizer.chat_template = template.jinja
        assert resolve_template("auto", fresh_tokenizer).name == name
    meta = _meta_template()
    for jinja in (meta, META_FIRST, meta.replace("\n", "\\n"), meta.replace("{% ", "{%").replace(" + ", "+")):
        fresh_tokenizer.chat_template = jinja
        assert resolve_template("auto", fresh_tokenizer).name == "llama3"
    fresh_tokenizer.chat_template = {"default": meta, "tool_use": "x"}
    assert resolve_template("auto", fresh_tokenizer).name == "llama3"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n\n", "\n"),
        ("| trim ", ""),
        ("<|eot_id|>", "<|eom_id|>"),
        ("'+ message", "' + ' ' + message"),
        ("{% for", " {% for"),
    ],
)
def test_auto_refuses_a_template_that_renders_otherwise(old, new, fresh_tokenizer):
    fresh_tokenizer.chat_template = _meta_template().replace(old, new)
    assert fresh_tokenizer.chat_template != _meta_template()
    with pytest.raises(ModelError, match="none that tuner knows .*set data.chat_template"):
        resolve_template("auto", fresh_tokenizer)


def test_a_base_tokenizer_needs_a_template_named(fresh_tokenizer):
    with pytest.raises(ModelError, match=r"has no chat template; set data.chat_template to one .*llama3"):
        resolve_template("auto", fresh_tokenizer)
    assert resolve_template("llama3", fresh_tokenizer).name == "llama3"


def test_unknown_template(tokenizer):
    with pytest.raises(RecipeError, match="unknown 'lama3' .did you mean 'llama3'"):
        resolve_template("lama3", tokenizer)


def test_missing_control_tokens_are_refused_by_name(bare_tokenizer):
    with pytest.raises(ModelError, match=r"'chatml' needs <\|im_start\|>, <\|im_end\|>, which the tokenizer"):
        resolve_template("chatml", bare_tokenizer)
    with pytest.raises(ModelError, match=r"'llama3' needs <\|start_header_id\|>"):
        resolve_template("llama3", bare_tokenizer)
    assert resolve_template("plain", bare_tokenizer).name == "plain"
    with pytest.raises(ModelError, match=r"has no <\|im_start\|>"):
        Renderer(bare_tokenizer, TEMPLATES["chatml"])


def test_missing_bos(bare_tokenizer):
    bare_tokenizer.bos_token = None
    with pytest.raises(ModelError, match="'plain' needs bos_token"):
        resolve_template("plain", bare_tokenizer)
    with pytest.raises(ModelError, match="has no bos_token"):
        Renderer(bare_tokenizer, None)


@pytest.mark.parametrize("bos", ["<|begin_of_text|>", "<|im_start|>", None])
def test_chatml_begins_with_one_bos_whatever_the_bos_is(bos, fresh_tokenizer):
    fresh_tokenizer.bos_token = bos
    chat, template = turns("Hello", "Hi"), TEMPLATES["chatml"]
    theirs = fresh_tokenizer.apply_chat_template(chat, chat_template=template.jinja, return_dict=False)
    (tokens,) = Renderer(fresh_tokenizer, template, "all").render(Example(tuple(as_messages(chat)), ((),)))
    assert tokens.ids() == theirs
    start = fresh_tokenizer.convert_tokens_to_ids("<|im_start|>")
    opening = [fresh_tokenizer.bos_token_id, start] if bos == "<|begin_of_text|>" else [start]
    assert theirs[: len(opening)] == opening and theirs[len(opening)] != start
    assert not tokens.trunk[0].trained and len(tokens.trunk[0].ids) == 1  # nothing comes before the first token


def test_slow_tokenizers_are_refused(monkeypatch, fresh_tokenizer):
    monkeypatch.setattr(type(fresh_tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="no fast version"):
        TextEncoder(fresh_tokenizer)


def test_fingerprint_keeps_what_decides_the_output():
    assert fingerprint("{{ a  |trim}}") == fingerprint("{{a | trim }}\n")
    assert fingerprint("{{ 'a\\n' }}") == fingerprint('{{ "a\n" }}')
    different = [
        "{{ a }}",
        " {{ a }}",
        "{{- a }}",
        "{{ 'a' }}",
        "{{ ' a' }}",
        "{{ 'a ' }}",
        "\n{{ a }}",
        "{{ 'a\\n' }}",
    ]
    assert len({fingerprint(t) for t in different}) == len(different)
