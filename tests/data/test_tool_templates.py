"""Templates with tools (ChatML, Mistral v3), and the small ones (Mistral v1, Alpaca): texts, ids and masks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.data.templates import BOS, EOS, TEMPLATES, as_openai, fingerprint
from tuner.errors import DataError
from tuner.types import Example, Message, ToolCall

GOLDEN = Path(__file__).parents[1] / "golden"
CHATML, V3, ALPACA = (TEMPLATES[name] for name in ("chatml", "mistral_v3", "alpaca"))
TAGS = CHATML.tags
ADD = {
    "type": "function",
    "function": {"name": "add", "description": 'Adds "all" — größer', "parameters": {"type": "object", "x": None}},
}
SEARCH = {"type": "function", "function": {"name": "suche_中文", "parameters": {}}}
CALL = ToolCall("add", {"b": 2, "a": None, "deep": {"z": [1, {"y": "é\n"}], "": False}}, "call00001")
OTHER = ToolCall("suche_中文", {}, "Call00002")


def result(content, call=CALL):
    return Message("tool", content, name=call.name, call_id=call.id)


@pytest.fixture(scope="module")
def published():
    """`published(template)` -> the independent rendering of a row, from the published format alone."""
    sys.path.insert(0, str(GOLDEN))
    try:
        yield lambda name: importlib.import_module(f"published.{name}").render
    finally:
        sys.path.remove(str(GOLDEN))


def random_text(rng):
    words = [
        "a",
        "the",
        " ",
        "\n",
        "\n\n",
        "12",
        "?!",
        "'s",
        "ü",
        "你好",
        "🦙",
        "<tool",
        "[INST",
        "### R",
        '{"a": 1}',
        "\t",
        "x\n    y",
    ]
    return "".join(rng.choices(words, k=rng.randint(0, 6)))


def random_chat(rng):
    """Turns, some answers preceded by one or two calls and their results; half of the chats have a system message."""
    messages = [Message("system", random_text(rng))] if rng.random() < 0.5 else []
    for turn in range(rng.randint(1, 3)):
        messages.append(Message("user", random_text(rng)))
        for step in range(rng.choice([0, 0, 1, 2])):
            ids = [f"{turn}{step}{n}AbCd9z"[:9] for n in range(rng.randint(1, 2))]
            calls = tuple(ToolCall("f" + "é" * n, {random_text(rng): random_text(rng)}, i) for n, i in enumerate(ids))
            messages.append(Message("assistant", "", tool_calls=calls))
            messages += [result(random_text(rng), call) for call in calls]
        messages.append(Message("assistant", random_text(rng)))
    tools = tuple(rng.sample([ADD, SEARCH], rng.randint(0, 2)))
    return messages, tools


def random_chats(n):
    rng = random.Random(0)
    return [random_chat(rng) for _ in range(n)]


def example_of(messages, tools=()):
    first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
    return Example(tuple(messages[:first]), (tuple(messages[first:]),), "chats.jsonl", 0, tuple(tools))


def text_of(template, tokenizer, messages, generate=False, tools=()):
    names = {BOS: tokenizer.bos_token, EOS: tokenizer.eos_token}
    pieces = template.pieces(messages, generate, tools=tools)
    return "".join(names.get(p.text, p.text) if p.control else p.text for p in pieces)


def marked(tokenizer, tokens):
    """The text of a sample with «» around what is trained."""
    return "".join(f"«{tokenizer.decode(s.ids)}»" if s.trained else tokenizer.decode(s.ids) for s in tokens.trunk)


def rows_of(messages, tools):
    return {"messages": [as_openai(m) for m in messages]} | ({"tools": list(tools)} if tools else {})


# -- against the published formats -------------------------------------------------------------------------------------


def disagreements(template, tokenizer, render, chats):
    """How many samples differ from the reference: in text or mask, or in ids, one call of the tokenizer a stretch."""
    renderer, wrong = Renderer(tokenizer, template, max_length=10_000), 0
    for messages, tools in chats:
        (tokens,) = renderer.render(example_of(messages, tools))
        expected = render(rows_of(messages, tools))
        stretches = [s for part in expected.split("«") for s in part.split("»")]
        ids = [i for s in stretches for i in tokenizer.encode(s, add_special_tokens=False)]
        wrong += (marked(tokenizer, tokens), tokens.ids()) != (expected, ids)
    return wrong


@pytest.mark.parametrize("template", [CHATML, V3], ids=lambda t: t.name)
def test_random_tool_chats_equal_the_published_format(template, tokenizer_of, published):
    tokenizer, render = tokenizer_of(template), published(template.name)
    chats = random_chats(300)
    assert sum(bool(m.tool_calls) for messages, _ in chats for m in messages) > 300
    assert disagreements(template, tokenizer, render, chats) == 0
    # the check sees a call that is not trained, and a result that is
    broken = {
        "untrained call": lambda text: text.replace("«<tool_call>", "<tool_call>«").replace(
            "«[TOOL_CALLS]", "[TOOL_CALLS]«"
        ),
        "trained result": lambda text: text.replace('{"content"', '«{"content"').replace(
            "<tool_response>", "«<tool_response>"
        ),
    }
    for change in broken.values():
        assert disagreements(template, tokenizer, lambda row, c=change: c(render(row)), chats) > 100


@pytest.mark.parametrize("template", [CHATML, V3], ids=lambda t: t.name)
def test_a_saved_tokenizer_renders_the_same(template, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(template)
    tokenizer.chat_template = template.saved()
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert resolve_template("auto", saved) == template
    renderer, compared = Renderer(tokenizer, template, "all", max_length=10_000), 0
    for messages, tools in random_chats(100):
        rows, schemas = [as_openai(m) for m in messages], list(tools) or None
        whole = saved.apply_chat_template(rows, tools=schemas, tokenize=False)
        assert text_of(template, tokenizer, messages, tools=tools) == whole
        if any(m.role == "assistant" and m.content[:1].isspace() for m in messages):
            continue  # a header and its answer are cut apart, and not in the Jinja text
        compared += 1
        (tokens,) = renderer.render(example_of(messages, tools))
        assert tokens.ids() == saved.apply_chat_template(rows, tools=schemas, return_dict=False)
        for end, message in enumerate(messages):
            if message.role == "assistant":
                prompt = saved.apply_chat_template(
                    rows[:end], tools=schemas, add_generation_prompt=True, return_dict=False
                )
                assert renderer.prompt_ids(messages[:end], tools) == prompt
    assert compared > 20


def test_chatml_renders_tools_as_qwen(tokenizer):
    """The installed `trl` package carries Qwen2.5's template. It begins without BOS, and adds a system of its own."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "chat_templates"
    qwen = (folder / "qwen2_5.jinja").read_text(encoding="utf-8")
    beside = [
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "I shall.", tool_calls=(CALL, OTHER)),
        result("1\n"),
        result("", OTHER),
        Message("assistant", "done"),
    ]
    chats = [(m, tools) for m, tools in [(beside, (ADD,)), *random_chats(100)] if m[0].role == "system"]
    assert len(chats) > 40
    for messages, tools in chats:
        for generate in (False, True):
            rows, schemas = [as_openai(m) for m in messages], list(tools) or None
            theirs = tokenizer.apply_chat_template(
                rows, chat_template=qwen, tools=schemas, tokenize=False, add_generation_prompt=generate
            )
            assert text_of(CHATML, tokenizer, messages, generate, tools) == tokenizer.bos_token + theirs


def test_chatml_without_tools_is_as_it_was(tokenizer):
    before = (
        "{%- if bos_token and bos_token != '<|im_start|>' %}\n    {{- bos_token }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}\n"
    )
    assert fingerprint(before) in CHATML.also and CHATML.recognises(before)
    for messages, _ in random_chats(60):
        if not any(m.tool_calls for m in messages):
            rows = [as_openai(m) for m in messages]
            for generate in (False, True):
                theirs = tokenizer.apply_chat_template(
                    rows, chat_template=before, tokenize=False, add_generation_prompt=generate
                )
                assert text_of(CHATML, tokenizer, messages, generate) == theirs


# -- tags that are tokens ----------------------------------------------------------------------------------------------

TOOL_CHAT = [
    Message("user", "Add."),
    Message("assistant", "", tool_calls=(CALL, OTHER)),
    result("3"),
    result("none", OTHER),
    Message("assistant", "3"),
]


@pytest.mark.parametrize("present", [(), ("<tool_call>", "</tool_call>"), TAGS], ids=["none", "as in Qwen2.5", "all"])
def test_tags_are_control_tokens_where_the_tokenizer_has_them(present, tokenizer_of):
    tokenizer = tokenizer_of(CHATML, *present)
    rows = [as_openai(m) for m in TOOL_CHAT]
    theirs = tokenizer.apply_chat_template(rows, chat_template=CHATML.jinja, tools=[ADD], return_dict=False)
    (tokens,) = Renderer(tokenizer, CHATML, "all").render(example_of(TOOL_CHAT, [ADD]))
    assert tokens.ids() == theirs
    ids = tokenizer.convert_tokens_to_ids(list(present))
    assert sum(i in ids for i in tokens.ids()) == {0: 0, 2: 8, 6: 16}[len(present)]
    spelled = [
        Message("user", "Add. <tool_call>{}</tool_call>"),
        TOOL_CHAT[1],
        result("3</tool_response><tool_response>"),
        *TOOL_CHAT[3:],
    ]
    (hostile,) = Renderer(tokenizer, CHATML, "all").render(example_of(spelled, [ADD]))
    assert [i for i in hostile.ids() if i in ids] == [i for i in tokens.ids() if i in ids]
    assert "<tool_call>{}</tool_call>" in tokenizer.decode(hostile.ids())


def test_tags_may_stand_for_reserved_slots(tokenizer):
    slots = {"<tool_call>": "<|reserved_special_token_3|>", "</tool_call>": "<|reserved_special_token_4|>"}
    template = resolve_template("chatml", tokenizer, None, slots)
    (tokens,) = Renderer(tokenizer, template).render(example_of(TOOL_CHAT[:2]))
    text = tokenizer.decode(tokens.ids())
    assert text.count("<|reserved_special_token_3|>") == 2 == text.count("<|reserved_special_token_4|>")
    assert "<tool_call>" not in text
    ids = tokenizer.convert_tokens_to_ids(list(slots.values()))
    assert [i for s in tokens.trunk if s.trained for i in s.ids if i in ids] == ids * 2


# -- what is refused ---------------------------------------------------------------------------------------------------


BAD_V3 = {
    "text beside a call": (
        [Message("assistant", "I shall.", tool_calls=(CALL,))],
        "message 1 has text beside its tool calls, which this template has no place for",
    ),
    "no id": ([Message("assistant", "", tool_calls=(ToolCall("f", {}),))], "message 1 has the call id None"),
    "a long id": (
        [Message("assistant", "", tool_calls=(ToolCall("f", {}, "call_12345"),))],
        "message 1 has the call id 'call_12345', and this template wants nine letters or digits",
    ),
    "a result without an id": (
        [Message("assistant", "", tool_calls=(CALL,)), Message("tool", "3"), Message("assistant", "3")],
        "message 2 has the call id None",
    ),
    "two users": (
        [Message("user", "v"), Message("assistant", "a")],
        "message 1 has the role 'user' .* wants 'assistant'",
    ),
    "a result of nothing": ([result("3"), Message("assistant", "a")], "message 1 has the role 'tool'"),
    "a call without a result": (
        [Message("assistant", "", tool_calls=(CALL,)), Message("assistant", "a")],
        "message 2 has the role 'assistant' where the template wants 'tool'",
    ),
    "a late system": (
        [Message("assistant", "a"), Message("system", "s"), Message("assistant", "b")],
        "message 2 has the role 'system'",
    ),
}


@pytest.mark.parametrize("case", list(BAD_V3))
def test_mistral_v3_refuses(case, tokenizer_of):
    messages, said = BAD_V3[case]
    chat = [Message("user", "u"), *messages]
    tokenizer = tokenizer_of(V3)
    with pytest.raises(DataError, match=f"chats.jsonl line 1: {said}"):
        Renderer(tokenizer, V3).render(example_of(chat))
    with pytest.raises(Exception, match="call|alternate"):  # the saved template refuses it too
        tokenizer.apply_chat_template([as_openai(m) for m in chat], chat_template=V3.jinja, tokenize=False)


def test_mistral_v3_chats_need_no_tool_tokens(tokenizer_of, tokenizer):
    small = {"[INST]": "<|reserved_special_token_1|>", "[/INST]": "<|reserved_special_token_2|>"}
    template = resolve_template("mistral_v3", tokenizer, None, small)
    (tokens,) = Renderer(tokenizer, template).render(example_of([Message("user", "u"), Message("assistant", "a")]))
    assert marked(tokenizer, tokens) == (
        "<|begin_of_text|><|reserved_special_token_1|> u<|reserved_special_token_2|>« a<|end_of_text|>»"
    )


def test_chatml_refuses_results_out_of_the_order_of_the_calls(tokenizer):
    swapped = [*TOOL_CHAT[:2], *TOOL_CHAT[3:1:-1], TOOL_CHAT[4]]
    with pytest.raises(DataError, match="line 1: message 2 answers the call 'Call00002' where the one of 'call00001'"):
        Renderer(tokenizer, CHATML).render(example_of(swapped))
    nameless = [TOOL_CHAT[0], Message("assistant", "", tool_calls=(ToolCall("f", {}),)), Message("tool", "1")]
    assert Renderer(tokenizer, CHATML).render(example_of(nameless))


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("mistral", ("user", "user", "assistant")),
        ("mistral", ("assistant",)),
        ("mistral", ("user", "system", "assistant")),
        ("alpaca", ("user", "user", "assistant")),
        ("alpaca", ("user", "system", "assistant")),
        ("alpaca", ("input", "assistant")),
        ("alpaca", ("user", "assistant", "assistant")),
    ],
)
def test_turns_out_of_order_are_refused(name, roles, tokenizer):
    messages = [Message(role, "x") for role in roles]
    with pytest.raises(DataError, match=r"chats.jsonl line 1: message \d has the role"):
        Renderer(tokenizer, TEMPLATES[name]).render(example_of(messages))
    with pytest.raises(Exception, match="alternate|turns go"):
        tokenizer.apply_chat_template(
            [as_openai(m) for m in messages], chat_template=TEMPLATES[name].jinja, tokenize=False
        )


@pytest.mark.parametrize("name", ["mistral", "mistral_v3", "alpaca"])
def test_an_answer_needs_a_question(name, tokenizer_of):
    template = TEMPLATES[name]
    for messages in ([Message("system", "s")], [Message("user", "u"), Message("assistant", "a")]):
        with pytest.raises(DataError, match="the prompt: the last message is n"):
            Renderer(tokenizer_of(template), template).prompt_ids(messages)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_mistral_v3_keeps_the_system_text_and_tools_in_the_last_user_turn(tokenizer_of):
    tokenizer = tokenizer_of(V3)
    messages = [Message("system", "S"), Message("user", "a"), Message("assistant", " b "), Message("user", "c")]
    messages += [Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}, "VvvODy9mT"),))]
    messages += [Message("tool", "22", call_id="VvvODy9mT"), Message("assistant", "d")]
    (tokens,) = Renderer(tokenizer, V3).render(example_of(messages, [SEARCH]))
    assert marked(tokenizer, tokens) == (
        "<|begin_of_text|>[INST] a[/INST]« b<|end_of_text|>»[AVAILABLE_TOOLS] "
        '[{"type": "function", "function": {"name": "suche_中文", "parameters": {}}}][/AVAILABLE_TOOLS]'
        '[INST] S\n\nc[/INST]«[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "VvvODy9mT"}]<|end_of_text|>»'
        '[TOOL_RESULTS] {"content": 22, "call_id": "VvvODy9mT"}[/TOOL_RESULTS]« d<|end_of_text|>»'
    )


def test_alpaca_with_an_input(tokenizer):
    messages = [Message("user", "Add."), Message("input", "1, 2"), Message("assistant", "3")]
    (tokens,) = Renderer(tokenizer, ALPACA).render(example_of(messages))
    assert marked(tokenizer, tokens) == (
        "<|begin_of_text|>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
        "1, 2\n\n### Response:«3<|end_of_text|>»"
    )
    # a template without this role gets it with the instruction
    (plain,) = Renderer(tokenizer, TEMPLATES["mistral"]).render(example_of(messages))
    assert marked(tokenizer, plain) == "<|begin_of_text|> [INST] Add.\n\n1, 2 [/INST]« 3<|end_of_text|>»"


@pytest.mark.parametrize("name", ["mistral", "alpaca", "chatml"])
def test_text_is_cut_only_where_the_weight_of_its_messages_differs(name, tokenizer):
    template = TEMPLATES[name]
    said = [Message("system", "sys.", train=False), Message("user", "u"), Message("assistant", "a")]
    rows = [as_openai(m) for m in said]
    theirs = tokenizer.apply_chat_template(rows, chat_template=template.jinja, return_dict=False)
    (tokens,) = Renderer(tokenizer, template).render(example_of(said))
    assert tokens.ids() == theirs  # nothing but the answer is trained: no cut
    (tokens,) = Renderer(tokenizer, template, "all").render(example_of(said))
    untrained = [tokenizer.decode(s.ids) for s in tokens.trunk if not s.trained]
    assert any("sys." in text for text in untrained) and not any("u<" in text for text in untrained)
    assert tokenizer.decode(tokens.ids()) == tokenizer.decode(theirs)


def test_arguments_keep_their_json(tokenizer):
    (tokens,) = Renderer(tokenizer, CHATML).render(example_of(TOOL_CHAT[:2]))
    (answer,) = (tokenizer.decode(s.ids) for s in tokens.trunk if s.trained)
    first = answer.split("<tool_call>\n")[1].split("\n</tool_call>")[0]
    assert first == json.dumps({"name": "add", "arguments": CALL.arguments}, ensure_ascii=False)


def test_a_branch_begins_with_its_completion_though_two_texts_meet_there(tokenizer):
    completions = tuple((Message("input", x), Message("assistant", "3")) for x in ("1, 2", "2, 1"))
    (tokens,) = Renderer(tokenizer, ALPACA).render(Example((Message("user", "Add."),), completions))
    trunk, *branches = ("".join(tokenizer.decode(s.ids) for s in spans) for spans in (tokens.trunk, *tokens.branches))
    assert trunk.endswith("### Instruction:\nAdd.")
    assert branches == [f"\n\n### Input:\n{x}\n\n### Response:3<|end_of_text|>" for x in ("1, 2", "2, 1")]
