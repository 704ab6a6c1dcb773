"""Every template against its published reference, its own Jinja text, and the saved tokenizer."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tests.data.chats import ODD, OFFICIAL, as_example, by_jinja, has_place, template_for, text_of, trained_runs
from tuner.data.encode import TextEncoder
from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.data.templates import TEMPLATES, fingerprint, recognise
from tuner.errors import DataError, ModelError, RecipeError
from tuner.types import ANSWERS

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
golden = importlib.import_module("regenerate")

LONG = 100_000  # tokens, more than any chat here has


# -- goldens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_golden(name, tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES[name])
    chats = json.loads((GOLDEN / f"chats_{name.replace('.', '_')}.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in golden.rows(name)}
    assert set(rows) <= {chat["name"] for chat in chats}
    assert sum(chat["text"] is not None for chat in chats) >= 50
    for chat in chats:
        row = chat if "messages" in chat else rows[chat["name"]]
        template = template_for(TEMPLATES[name], row)
        renderer = Renderer(tokenizer, template, chat.get("train_on", "assistant"), LONG)
        if chat["text"] is None:
            with pytest.raises(DataError):
                renderer.render(as_example(row))
            continue
        (tokens,) = renderer.render(as_example(row))
        assert text_of(template, tokenizer, row) == chat["text"].replace("«", "").replace("»", ""), chat["name"]
        assert tokens.ids() == chat["ids"], chat["name"]
        assert trained_runs(tokens) == chat["trained"], chat["name"]


def test_golden_files_are_what_the_references_say():
    """So that no golden file is older than its reference, and ids are the tokenizer's own."""
    by_hand = json.loads((GOLDEN / "marked_by_hand.json").read_text(encoding="utf-8"))
    for name in TEMPLATES:
        chats = json.loads((GOLDEN / f"chats_{name.replace('.', '_')}.json").read_text(encoding="utf-8"))
        texts = [golden.reference(name)(row) for row in golden.rows(name)] + [c["text"] for c in by_hand.get(name, [])]
        assert [chat["text"] for chat in chats] == texts, f"run tests/golden/regenerate.py {name}"
        tokenizer = golden.tokenizer_of(name)
        assert all(chat == golden.golden(tokenizer, chat) for chat in chats[::7])


# -- 2,000 random conversations against the references -----------------------------------------------------------------


def text(rng, longest=8):
    return "".join(rng.choices(ODD, k=rng.randint(0, longest)))


def random_call(rng):
    arguments = {rng.choice(["a", "b", "ü"]): rng.choice([None, 1, 0.5, True, text(rng), [text(rng)], {"x": None}])}
    function = {"name": rng.choice(["add", "get_weather"]), "arguments": arguments if rng.random() < 0.8 else {}}
    return {"id": f"call{rng.randint(0, 99999):05}", "type": "function", "function": function}


def random_row(rng, with_tools, with_verdict):
    """Turns that mostly alternate, now and then with a system message, tools, calls and results, odd or misplaced."""
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.3 else []
    row = {"name": "random", "messages": messages}
    if with_tools and rng.random() < 0.5:
        parameters = {"type": "object", "properties": {text(rng): {"type": "string"}}}
        row["tools"] = [
            {"type": "function", "function": {"name": "add", "description": text(rng), "parameters": parameters}}
            for _ in range(rng.randint(1, 2))
        ]
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.03:
            messages.append({"role": "user", "content": text(rng)})
        while with_tools and rng.random() < 0.3:
            calls = [random_call(rng) for _ in range(1 if rng.random() < 0.9 else 2)]
            content = rng.choice([None, "", " "]) if rng.random() < 0.9 else text(rng)
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [
                {"role": "tool", "content": text(rng), "name": c["function"]["name"], "tool_call_id": c["id"]}
                for c in calls
            ]
        messages.append({"role": "assistant", "content": text(rng)})
    if with_verdict:
        verdict = rng.choice(["safe", "unsafe\nS3", "unsafe\nS14,S1", "\nsafe ", "unsafe", "unsafe\nS15", text(rng)])
        messages[-1 if rng.random() < 0.5 else len(messages) :] = [{"role": "assistant", "content": verdict}]
    if rng.random() < 0.1:
        row["date_string"] = f"{rng.randint(1, 28)} Feb 2025"
    return row


def check_against_reference(template, tokenizer, count):
    """Our ids and mask are those of the reference, stretch by stretch; what it has no place for, we refuse."""
    render, rng = golden.reference(template.name), random.Random(0)
    whole = golden.tokenizer_of(template.name)
    renderer = Renderer(tokenizer, template, max_length=LONG)
    rendered = refused = 0
    for _ in range(count):
        row = random_row(rng, with_tools=template.tools, with_verdict=template.name == "llama_guard")
        if renderer.template is not (dated := template_for(template, row)):
            renderer = Renderer(tokenizer, dated, max_length=LONG)
        expected = render(row)
        if expected is None:
            with pytest.raises(DataError):
                renderer.render(as_example(row))
            refused += 1
            continue
        (tokens,) = renderer.render(as_example(row))
        assert (tokens.ids(), trained_runs(tokens)) == golden.encode(whole, expected), row
        rendered += 1
    assert rendered > count / 5
    return rendered, refused


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_random_conversations_are_rendered_and_masked_as_published(name, tokenizer_of):
    check_against_reference(TEMPLATES[name], tokenizer_of(TEMPLATES[name]), 2000)


MUTANTS = {
    "header trained": lambda p: p._replace(owner=p.message) if p.text == "\n\n" else p,
    "terminator untrained": lambda p: p._replace(owner=None) if p.control else p,
    "result trained": lambda p: p._replace(owner=p.message - 1) if p.text.startswith('\n\n"') else p,
    "call untrained": lambda p: p._replace(owner=None) if p.text.startswith('{"name"') else p,
    "another day": lambda p: p._replace(text=p.text.replace("26 Jul", "27 Jul")),
    "not trimmed": lambda p: p._replace(text=p.text + " ") if p.owner is not None and not p.control else p,
    "another end": lambda p: p._replace(text="<|eom_id|>") if p.text == "<|eot_id|>" and p.owner is not None else p,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_catches(mutant, tokenizer):
    template = TEMPLATES["llama3.1"]

    def pieces(*args, date_string: str = "26 Jul 2024", **options):
        return [MUTANTS[mutant](p) for p in template.pieces(*args, date_string=date_string, **options)]

    with pytest.raises(AssertionError):
        check_against_reference(replace(template, pieces=pieces), tokenizer, 100)


# -- the Jinja text that is saved --------------------------------------------------------------------------------------


def check_jinja(template, tokenizer, rows):
    """The saved text renders what the pieces say, and refuses what they refuse."""
    for row in rows:
        for generate in (False, True) if has_place(template, row) else ():
            try:
                expected = text_of(template, tokenizer, row, generate)
            except DataError:
                if not generate:
                    with pytest.raises(TemplateError):
                        by_jinja(tokenizer, template.saved(), row, tokenize=False)
                continue
            assert by_jinja(tokenizer, template.saved(), row, generate, tokenize=False) == expected, row["name"]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_jinja_renders_the_text_of_the_pieces(name, tokenizer):
    rng = random.Random(1)
    rows = [random_row(rng, TEMPLATES[name].tools, name == "llama_guard") for _ in range(100)]
    check_jinja(TEMPLATES[name], tokenizer, golden.rows(name) + rows)


def reloaded(tokenizer, template, folder):
    """The tokenizer of a directory that was saved with the template."""
    tokenizer.chat_template = template.saved()
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


SETTINGS = [
    *((name, {}, {}) for name in TEMPLATES),
    ("llama3.1", {"date_string": 'the "1st" {# of #} June', "builtin_tools": ["brave_search"]}, {}),
    ("llama3.1", {"builtin_tools": []}, {"<|eom_id|>": "<|reserved_special_token_1|>"}),
    ("llama3.2", {"tools_in_user_message": False}, {"<|eot_id|>": "<|reserved_special_token_0|>"}),
    ("llama3.3", {"date_string": "1er août 2024"}, {"<|start_header_id|>": "<|reserved_special_token_2|>"}),
    (
        "llama_guard",
        {"categories": {"S1": "Größe #1.", "S2": 'A "b".', "S7": "c", "S9": "", "S10": "d", "S14": "e"}},
        {},
    ),
]


@pytest.mark.parametrize(("name", "options", "renamed"), SETTINGS)
def test_ids_equal_apply_chat_template_of_the_saved_directory(name, options, renamed, tokenizer_of, tmp_path):
    template = TEMPLATES[name].with_options(options).with_control_tokens(renamed)
    saved = reloaded(tokenizer_of(template), template, tmp_path)
    own = resolve_template("auto", saved)
    assert (own.name, own.options, own.renamed, own.saved()) == (name, options, renamed, template.saved())
    renderer, count = Renderer(saved, own, max_length=LONG), 0
    for row in golden.rows(name):
        example = as_example(row)
        if golden.reference(name)(row) is None:
            continue
        (tokens,) = renderer.render(example)
        prompt = renderer.prompt_ids(example.prompt, example.tools) if name != "llama_guard" else None
        count += 1
        answers = [m for m in example.completions[0] if m.role in ANSWERS]
        whole = by_jinja(saved, None, row, return_dict=False)
        if name not in CUT or (name != "plain" and all(m.content[:1].strip() for m in answers)):
            assert tokens.ids() == whole, row["name"]
        assert sum(len(s.ids) for s in tokens.trunk if s.trained) >= (1 if name == "llama_guard" else len(answers))
        if prompt is not None:
            asked = row | {"messages": row["messages"][: len(example.prompt)]}
            assert prompt == by_jinja(saved, None, asked, True, return_dict=False)
            # Mistral's v3 template has tools and system text in the last user turn, wherever that is
            assert prompt == tokens.ids()[: len(prompt)] or name == "mistral_v3"
    assert count >= (10 if options else 50)


# untrimmed: the first letters of an answer may be one token with the end of its prompt, tokenised as one text
CUT = {"alpaca", "chatml", "mistral", "plain"}


def test_auto_recognises_the_texts_that_others_wrote(fresh_tokenizer):
    for name, text in OFFICIAL.items():
        for jinja in (text, text.replace("\r", ""), text.replace("{%- ", "{%-").replace("{% ", "{%")):
            fresh_tokenizer.chat_template = jinja
            assert resolve_template("auto", fresh_tokenizer).name == name
    fresh_tokenizer.chat_template = {"default": OFFICIAL["llama3"], "tool_use": "x"}
    assert resolve_template("auto", fresh_tokenizer).name == "llama3"
    for options, said in (({"tools_in_user_message": False}, False), ({}, True)):
        fresh_tokenizer.chat_template = OFFICIAL["llama3.2"]
        assert resolve_template("auto", fresh_tokenizer, options).options.get("tools_in_user_message", True) is said


def test_a_marked_text_that_was_changed_is_not_recognised():
    template = TEMPLATES["llama3.1"].with_options({"date_string": "1 May 2025"})
    saved = template.saved()
    assert recognise(saved).options == {"date_string": "1 May 2025"}
    for changed in (
        saved.replace("1 May", "2 May", 1),
        saved.replace("ipython", "python"),
        saved.replace("llama3.1", "x"),
    ):
        assert changed != saved and recognise(changed) is None


# -- dates -------------------------------------------------------------------------------------------------------------


def at(year, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 2, 3, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_two_clocks_give_the_same_ids(name, tokenizer_of, monkeypatch, tmp_path):
    saved = reloaded(tokenizer_of(TEMPLATES[name]), TEMPLATES[name], tmp_path)
    chat = {"messages": [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "safe"}]}
    hashes, official = set(), set()
    for year in (2025, 2031):
        at(year, monkeypatch)
        (tokens,) = Renderer(saved, resolve_template("auto", saved)).render(as_example(chat))
        ids = (tokens.ids(), by_jinja(saved, None, chat, return_dict=False))
        hashes.add(hashlib.sha256(json.dumps(ids).encode()).hexdigest())
        official.add(by_jinja(saved, OFFICIAL["llama3.2"], chat, tokenize=False))
    assert len(hashes) == 1 and len(official) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("llama3", {"date_string": "x"}, "chat_template 'llama3' has no option 'date_string'; its options: none"),
        ("llama3.1", {"date_strng": "x"}, r"no option 'date_strng' \(did you mean 'date_string'\?\)"),
        ("llama3.1", {"date_string": 3}, "'llama3.1': date_string=3"),
        ("llama3.2", {"builtin_tools": []}, "'llama3.2' has no option 'builtin_tools'"),
        ("llama3.3", {"builtin_tools": "brave_search"}, "builtin_tools='brave_search'"),
        ("llama3.1", {"tools": []}, "has no option 'tools'"),
        ("llama_guard", {"categories": {}}, "categories is empty"),
        ("llama_guard", {"categories": {"S1, S2": "x"}}, "the code 'S1, S2' cannot stand in a verdict"),
        ("llama_guard", {"categories": ["S1"]}, "categories="),
    ],
)
def test_options_are_refused_by_name(name, options, said):
    with pytest.raises(RecipeError, match=said):
        TEMPLATES[name].with_options(options)


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
    for name in ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama_guard"):
        with pytest.raises(ModelError, match=rf"'{name}' needs <\|start_header_id\|>"):
            resolve_template(name, bare_tokenizer)
    for name in ("plain", "llama2"):
        assert resolve_template(name, bare_tokenizer).name == name
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
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    template = TEMPLATES["chatml"]
    theirs = by_jinja(fresh_tokenizer, template.jinja, chat, return_dict=False)
    (tokens,) = Renderer(fresh_tokenizer, template, "all").render(as_example(chat))
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


def test_control_tokens_may_change_places_in_the_saved_text_too(tokenizer_of):
    template = TEMPLATES["llama3"]
    a, b = "<|start_header_id|>", "<|end_header_id|>"
    swapped = template.with_control_tokens({a: b, b: a})
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    tokenizer = tokenizer_of(template)
    assert by_jinja(tokenizer, swapped.saved(), row, tokenize=False) == text_of(swapped, tokenizer, row)
    assert f"{b}user{a}" in text_of(swapped, tokenizer, row)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_bos_and_eos_are_the_tokenizers_to_name(name):
    with pytest.raises(RecipeError, match=f"chat_template 'llama2' has no control token '{name}'; it has: none"):
        TEMPLATES["llama2"].with_control_tokens({name: "<|reserved_special_token_0|>"})


def test_options_that_are_set_one_after_the_other_are_all_written():
    template = TEMPLATES["llama3.1"].with_options({"date_string": "1 Jan 2025"})
    template = template.with_options({"tools_in_user_message": False})
    options = {"date_string": "1 Jan 2025", "tools_in_user_message": False}
    assert template.options == options
    assert template.jinja == TEMPLATES["llama3.1"].with_options(options).jinja


def test_settings_name_every_option_with_its_value():
    for name in ("llama3.1", "llama3.3"):
        given = TEMPLATES[name].with_options({"builtin_tools": ["search"]})
        assert given.settings() == {
            "date_string": "26 Jul 2024",
            "tools_in_user_message": True,
            "builtin_tools": ["search"],
        }
    assert TEMPLATES["llama3"].settings() == {}
