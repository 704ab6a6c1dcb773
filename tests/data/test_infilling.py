"""Infilled code, and chats of Llama 2's kind of tokenizer, to the id."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tuner.data.formats import detect, parser
from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.data.templates import TEMPLATES, as_openai, recognise
from tuner.errors import DataError, ModelError, RecipeError
from tuner.types import Example, Message

CODE = TEMPLATES["codellama"]
PRE, SUF, MID, EOT = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
INFILL = (PRE, SUF, MID, EOT)
KINDS = ["metaspace", "prepend"]
ROWS = [
    ("def add(a, b):\n    return ", "\n\nprint(1)\n", "a + b"),
    (" two blanks: ", "  x ", "  y "),
    ("", "tail", "whole"),
    ("head", "", "whole"),
    ("a", "b", ""),
    ("", "", " "),
    ("s = '你好", "🦙'\n", "，世界"),
]


def infilling(prefix, suffix, middle, row=0):
    parsed = parser("infilling")({"prefix": prefix, "suffix": suffix, "middle": middle})
    return Example(parsed.prompt, parsed.completions, "code.jsonl", row)


def chat(*contents, system=None):
    messages = [Message("system", system)] if system is not None else []
    return [*messages, *(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))]


def one(renderer, example):
    (tokens,) = renderer.render(example)
    return tokens


def mask(tokens):
    return [s.trained for s in tokens.trunk for _ in s.ids]


# -- the format --------------------------------------------------------------------------------------------------------


def test_format_keeps_the_three_parts_to_the_letter():
    example = parser("infilling")({"prefix": " a\n", "suffix": "", "middle": "\tb ", "repo": "x"})
    assert example.prompt == (Message("prefix", " a\n"), Message("suffix", ""))
    assert example.completions == ((Message("middle", "\tb "),),)
    assert not example.is_preference


def test_format_is_detected_and_maps_columns():
    row = {"before": "a", "after": "b", "fill": "c"}
    columns = {"prefix": "before", "suffix": "after", "middle": "fill"}
    assert detect({"prefix": "a", "suffix": "b", "middle": "c"}).name == "infilling"
    assert detect(row, columns).name == "infilling"
    assert [m.content for m in parser("infilling", columns)(row).prompt] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prefix": "a", "suffix": "b"}, "there is no column 'middle'"),
        ({"prefix": "a", "suffix": None, "middle": "c"}, "suffix is null, not a string"),
        ({"prefix": 1, "suffix": "b", "middle": "c"}, "prefix is 1, not a string"),
    ],
)
def test_format_names_what_is_wrong(row, said):
    with pytest.raises(DataError, match=said):
        parser("infilling")(row)


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("suffix_first", [False, True])
def test_byte_level_ids_and_mask(suffix_first, row, tokenizer_of):
    tokenizer = tokenizer_of(CODE)
    template = CODE.with_options({"suffix_first": suffix_first})
    bos, pre, suf, mid, eot = (tokenizer.convert_tokens_to_ids(t) for t in ("<|begin_of_text|>", *INFILL))
    prefix, suffix, middle = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in row)
    prompt = [bos, pre, suf, *suffix, mid, *prefix] if suffix_first else [bos, pre, *prefix, suf, *suffix, mid]
    tokens = one(Renderer(tokenizer, template), infilling(*row))
    assert tokens.ids() == [*prompt, *middle, eot]
    assert mask(tokens) == [False] * len(prompt) + [True] * (len(middle) + 1)
    assert Renderer(tokenizer, template).prompt_ids(infilling(*row).prompt) == prompt


def published_prompt(raw, prefix, suffix, suffix_first):
    """`infilling_prompt_tokens` of generation.py, with SentencePiece's `encode` on a tokenizer that adds no blanks.

    It puts one before every text but the empty one, and `encode_infilling` hides it behind another character.
    """

    def encode(text):
        return raw.encode(" " + text, add_special_tokens=False) if text else []

    def encode_infilling(text):
        return encode("☺" + text)[2:]

    bos, pre, suf, mid = (raw.convert_tokens_to_ids(t) for t in ("<s>", PRE, SUF, MID))
    if suffix_first:
        return [bos, pre, suf, *encode_infilling(suffix), mid, *encode(prefix)]
    return [bos, pre, *encode(prefix), suf, *encode_infilling(suffix), mid]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_ids_are_metas(kind, suffix_first, row, sentencepiece):
    tokenizer, raw = sentencepiece(kind, INFILL), sentencepiece("raw", INFILL)
    assert len(raw.encode(" ☺", add_special_tokens=False)) == 2  # so that the two hidden ones are these
    prefix, suffix, middle = row
    template = CODE.with_options({"suffix_first": suffix_first})
    prompt = published_prompt(raw, prefix, suffix, suffix_first)
    answer = raw.encode(middle, add_special_tokens=False)  # no blank of the tokenizer's own before the middle
    tokens = one(Renderer(tokenizer, template), infilling(*row))
    assert tokens.ids() == [*prompt, *answer, raw.convert_tokens_to_ids(EOT)]
    assert mask(tokens) == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert Renderer(tokenizer, template).prompt_ids(infilling(*row).prompt) == prompt


def test_the_tokenizers_blank_makes_a_difference(sentencepiece):
    """The check above would see a blank too many or too few."""
    raw = sentencepiece("raw", INFILL)
    assert len({tuple(raw.encode(t, add_special_tokens=False)) for t in ("a + b", " a + b", "  a + b")}) == 3


# -- control tokens ----------------------------------------------------------------------------------------------------


def test_chats_need_no_infilling_tokens(sentencepiece):
    tokenizer = sentencepiece("prepend")
    template = resolve_template("codellama", tokenizer)
    messages = chat("Hello", "Hi", "And?", system="Be brief.")
    renderer = Renderer(tokenizer, template)
    assert renderer.prompt_ids(messages) == Renderer(tokenizer, TEMPLATES["llama2"]).prompt_ids(messages)
    assert tokenizer.convert_ids_to_tokens(renderer.stop_ids) == ["</s>"]


def test_infilling_without_its_tokens_is_refused_by_name(sentencepiece):
    renderer = Renderer(sentencepiece("metaspace", [PRE]), CODE)
    told = []
    for on_bad in (None, lambda *found: told.append(found)):
        with pytest.raises(ModelError, match="'codellama' needs ▁<SUF>, ▁<MID>, ▁<EOT>, which the tokenizer"):
            renderer.render_batch([infilling("a", "b", "c")], on_bad)
    assert not told  # it is not a matter of one row
    with pytest.raises(ModelError, match="'codellama' needs ▁<SUF>, ▁<MID>, which"):
        renderer.prompt_ids(infilling("a", "b", "c").prompt)


def test_reserved_slots_stand_for_infilling_tokens(tokenizer):
    slots = {name: f"<|reserved_special_token_{i}|>" for i, name in enumerate(INFILL)}
    with pytest.raises(ModelError, match=r"data.control_tokens: \{'▁<PRE>': '<\|reserved_special_token_0\|>'\}"):
        Renderer(tokenizer, CODE).render(infilling("a", "b", "c"))
    template = resolve_template("codellama", tokenizer, {"suffix_first": True}, slots)
    renderer = Renderer(tokenizer, template)
    tokens = one(renderer, infilling("a", "b", "c"))
    s = list(slots.values())
    assert tokenizer.decode(tokens.ids()) == f"<|begin_of_text|>{s[0]}{s[1]}b{s[2]}ac{s[3]}"
    assert tokenizer.convert_tokens_to_ids(s[3]) in renderer.terminator_ids
    found = recognise(template.saved())
    assert found is not None and (found.name, found.saved()) == ("codellama", template.saved())
    assert dict(found.renamed) == slots
    with pytest.raises(RecipeError, match="no control token '▁<EOP>' .did you mean '▁<EOT>'"):
        resolve_template("codellama", tokenizer, {}, {"▁<EOP>": s[0]})
    with pytest.raises(RecipeError, match="share one slot"):
        resolve_template("codellama", tokenizer, {}, {PRE: s[0], SUF: s[0]})


def test_generation_stops_at_the_end_of_the_infilling(tokenizer_of):
    tokenizer = tokenizer_of(CODE)
    assert tokenizer.convert_ids_to_tokens(Renderer(tokenizer, CODE).stop_ids) == ["<|end_of_text|>", EOT]


# -- the saved template ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix_first", [False, True])
def test_a_saved_tokenizer_renders_the_same(suffix_first, tokenizer_of, tmp_path):
    template = CODE.with_options({"suffix_first": suffix_first})
    tokenizer = tokenizer_of(CODE)
    tokenizer.chat_template = template.saved()
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    found = resolve_template("auto", saved)
    assert (found.name, dict(found.options)) == ("codellama", {"suffix_first": suffix_first})
    for number, row in enumerate(ROWS):
        example = infilling(*row, row=number)
        messages = [as_openai(m) for m in (*example.prompt, *example.completions[0])]
        ours = one(Renderer(tokenizer, template), example).ids()
        assert tokenizer.decode(ours) == saved.apply_chat_template(messages, tokenize=False)
        if not suffix_first:  # with it prefix and middle meet, and only we cut the ids there
            assert ours == saved.apply_chat_template(messages, return_dict=False)
        prompt = saved.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
        assert Renderer(tokenizer, template).prompt_ids(example.prompt) == prompt


@pytest.mark.parametrize(
    "roles",
    [
        ("suffix", "prefix", "middle"),
        ("prefix", "middle"),
        ("prefix", "suffix", "middle", "middle"),
        ("system", "prefix", "suffix", "middle"),
        ("prefix", "suffix", "assistant"),
    ],
)
def test_an_infilling_in_another_order_is_refused(roles, tokenizer_of):
    example = Example((), (tuple(Message(role, "x") for role in roles),), "code.jsonl", 3)
    with pytest.raises(DataError, match=rf"code.jsonl line 4: the roles are {', '.join(roles)}, but an infilling has"):
        Renderer(tokenizer_of(CODE), CODE).render(example)


def test_a_prompt_to_infill_has_no_middle(tokenizer_of):
    with pytest.raises(DataError, match="a prompt no middle yet"):
        Renderer(tokenizer_of(CODE), CODE).prompt_ids([Message(r, "x") for r in ("prefix", "suffix", "middle")])


def test_chat_templates_have_no_place_for_infilling(tokenizer):
    with pytest.raises(DataError, match="code.jsonl line 1: message 0 has the role 'prefix'"):
        Renderer(tokenizer, TEMPLATES["llama3"]).render(infilling("a", "b", "c"))


# -- chats on Llama 2's kind of tokenizer ------------------------------------------------------------------------------

CHATS = [
    chat("hello", "the user said hello"),
    chat("hello", "a", "b", "a + b", system="Be brief."),
    chat("  blanks  ", "  around  ", "\nx\n", " y"),
    chat("Größe 你好", "🦙", system="日本語"),
    chat("hello"),
    chat("hello", "a", "b", system=" s "),
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", ["llama2", "codellama", "mistral", "mistral_v3", "alpaca", "chatml", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_chats_equal_apply_chat_template(kind, name, messages, sentencepiece):
    template = TEMPLATES[name]
    tokenizer = sentencepiece(kind, [c for c in (*template.control, *template.optional) if "_token" not in c])
    generate = messages[-1].role == "user"
    theirs = tokenizer.apply_chat_template(
        [as_openai(m) for m in messages],
        chat_template=template.jinja,
        add_generation_prompt=generate,
        return_dict=False,
    )
    renderer = Renderer(tokenizer, template, "all")
    if name == "plain" and len(messages) > 1:
        return  # a prompt and its answer are cut apart, and not in the Jinja text
    ours = renderer.prompt_ids(messages) if generate else one(renderer, Example((), (tuple(messages),))).ids()
    assert ours == theirs


@pytest.mark.parametrize("name", ["llama2", "codellama"])
def test_llama2_ids_are_metas(name, sentencepiece):
    """`chat_completion` of Meta's llama repository: each pair of turns is encoded as one text, with the tokenizer's own
    blank before it, between BOS and EOS."""
    tokenizer, raw = sentencepiece("prepend"), sentencepiece("raw")
    pairs = ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST] a ", "[INST] b [/INST] a + b "]
    expected = [[1, *raw.encode(" " + text, add_special_tokens=False), 2] for text in pairs]
    tokens = one(Renderer(tokenizer, TEMPLATES[name]), Example((), (tuple(CHATS[1]),)))
    assert tokens.ids() == [*expected[0], *expected[1]]
    answers = [tokenizer.decode(s.ids) for s in tokens.trunk if s.trained]
    assert answers == [" a </s>", " a + b </s>"]


def test_the_small_tokenizer_is_of_the_published_kind(sentencepiece):
    for kind, tokens in (("metaspace", ["▁hello", "</s>", "hello"]), ("prepend", ["▁hello", "</s>", "▁hello"])):
        tokenizer = sentencepiece(kind)
        found = tokenizer.convert_ids_to_tokens(tokenizer.encode("hello</s>hello", add_special_tokens=False))
        joined = "".join(found).split("</s>")
        assert [joined[0], "</s>", joined[1]] == tokens
        assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
