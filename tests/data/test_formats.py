from __future__ import annotations

import pytest

from tuner.data.formats import FORMATS, detect, parser, unread_columns
from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError, RecipeError
from tuner.types import Message

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def chat(*messages):
    return {"messages": list(messages)}


def test_messages_begin_their_completion_at_the_first_answer():
    example = parser("messages")(chat({"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER) | {"id": 7})
    assert [m.role for m in example.prompt] == ["system", "user"]
    assert [m.role for m in example.completions[0]] == ["assistant", "user", "assistant"]


def test_messages_keep_train_and_weight():
    example = parser("messages")(
        chat(USER, ANSWER | {"train": False}, ANSWER | {"weight": 0.5}, ANSWER | {"train": None, "weight": None})
    )
    assert [(m.train, m.weight) for m in example.completions[0]] == [(False, 1.0), (None, 0.5), (None, 1.0)]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER], "no assistant turn"),
        ([], "messages is [], not a list of messages"),
        ("hello", "messages is 'hello', not a list"),
        ([USER, "hi"], "messages[1] is 'hi', not an object"),
        ([USER, {"role": "assistant"}], "messages[1] has no 'content'; it has role"),
        ([USER, {"role": "assistant", "contents": "a"}], "did you mean 'contents'?"),
        ([{"role": "human", "content": "q"}, ANSWER], "messages[0].role is 'human'; allowed: system, user, assistant"),
        ([{"role": "asistant", "content": "q"}, ANSWER], "did you mean 'assistant'?"),
        ([{"role": "ipython", "content": "q"}, ANSWER], "messages[0].role is 'ipython'"),
        ([{"role": ["user"], "content": "q"}, ANSWER], "messages[0].role is ['user']"),
        ([{"role": "user<|eot_id|>", "content": "q"}, ANSWER], "messages[0].role is 'user<|eot_id|>'"),
        ([{"role": None, "content": "q"}, ANSWER], "messages[0].role is null"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null, not a string"),
        ([USER, {"role": "assistant", "content": 3}], "messages[1].content is 3, not a string"),
        ([USER, {"role": "assistant", "content": []}], "messages[1].content is [], not a string"),
        (
            [USER, {"role": "assistant", "content": ["a"]}],
            "messages[1].content[0] is 'a', not a part {type: text, text}",
        ),
        (
            [USER, {"role": "assistant", "content": [{"text": "a"}]}],
            "messages[1].content[0] is {'text': 'a'}, not a part",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "messages[0].content[0].type is 'image_url'"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "messages[1].content[0].text is null"),
        ([USER, ANSWER | {"content": "\ud800"}], "half of a surrogate pair"),
        ([USER, ANSWER | {"train": "no"}], "messages[1].train is 'no'; write true or false"),
        ([USER, ANSWER | {"weight": -1}], "messages[1].weight is -1; write a number of at least 0"),
        ([USER, ANSWER | {"weight": True}], "messages[1].weight is True"),
        ([USER, ANSWER | {"weight": float("nan")}], "messages[1].weight is nan"),
    ],
)
def test_bad_messages_are_refused_with_the_place_in_the_row(messages, said):
    with pytest.raises(DataError) as error:
        parser("messages")({"messages": messages})
    assert said in str(error.value)


def test_content_may_be_parts_of_text_which_are_joined_as_they_are():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "\nb", "image_url": None}]
    example = parser("messages")(chat({"role": "user", "content": parts}, ANSWER))
    assert example.prompt == (Message("user", "a \nb"),)


def test_developer_is_what_openai_now_calls_system():
    example = parser("messages")(chat({"role": "developer", "content": "s"}, USER, ANSWER))
    assert example.prompt[0] == Message("system", "s")


def test_prompt_completion_takes_strings_lists_and_mapped_columns():
    strings = parser("prompt_completion")({"prompt": "q", "completion": "a", "extra": 1})
    lists = parser("prompt_completion")({"prompt": [USER], "completion": [ANSWER]})
    mapped = parser("prompt_completion", {"prompt": "question", "completion": "answer"})(
        {"question": "q", "answer": "a"}
    )
    assert strings == lists == mapped
    assert strings.prompt == (Message("user", "q"),)
    assert strings.completions == ((Message("assistant", "a"),),)


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prompt": "q"}, {}, "there is no column 'completion'; the row has the columns prompt"),
        ({"prompt": "q", "completion": 3}, {}, "completion is 3, not a string"),
        ({"prompt": "q", "completion": [USER]}, {}, "completion has no assistant turn"),
        ({"prompt": "q", "answers": "a"}, {"completion": "answer"}, "'answer' (data.columns maps completion to it)"),
    ],
)
def test_bad_prompt_completion_rows(row, columns, said):
    with pytest.raises(DataError) as error:
        parser("prompt_completion", columns)(row)
    assert said in str(error.value)


def test_text_is_one_message_and_never_empty():
    example = parser("text")({"text": " x\n"})
    assert example.prompt == () and example.completions == ((Message("text", " x\n"),),)
    for value, said in (("", "text is empty"), (None, "text is null, not a string"), (1, "text is 1")):
        with pytest.raises(DataError, match=said):
            parser("text")({"text": value})


def test_columns_must_be_columns_of_the_format():
    with pytest.raises(
        RecipeError, match="reads no 'promt' .did you mean 'prompt'.*it reads: prompt, completion, tools"
    ):
        parser("prompt_completion", {"promt": "question"})
    with pytest.raises(RecipeError, match="unknown data format 'message' .did you mean 'messages'"):
        parser("message")


HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
PAIR = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("row", "columns", "name"),
    [
        ({"messages": []}, {}, "messages"),
        ({"messages": [], "tools": []}, {}, "messages"),
        ({"prompt": "", "completion": ""}, {}, "prompt_completion"),
        ({"prompt": "", "completion": "", "label": "maths"}, {}, "prompt_completion"),
        ({"text": ""}, {}, "text"),
        ({"text": "", "label": 1}, {}, "text"),
        ({"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"body": "", "messages": []}, {"text": "body"}, "text"),
        ({"prompt": "", "prompt_id": "", "messages": []}, {}, "messages"),
        ({"conversations": [{"from": "human", "value": ""}]}, {}, "sharegpt"),
        ({"conversations": [USER]}, {"messages": "conversations"}, "messages"),
        ({"instruction": "", "output": ""}, {}, "alpaca"),
        ({"instruction": "", "input": "", "output": ""}, {}, "alpaca"),
        ({"instruction": "", "context": "", "response": ""}, {"input": "context", "output": "response"}, "alpaca"),
        ({"instruction": "", "response": ""}, {}, "question_answer"),
        ({"question": "", "answer": ""}, {}, "question_answer"),
        ({"query": "", "response": ""}, {}, "question_answer"),
        ({"input": "", "output": ""}, {}, "question_answer"),
        ({"problem": "", "solution": ""}, {}, "question_answer"),
        ({"q": "", "a": ""}, {"question": "q", "answer": "a"}, "question_answer"),
        (HH, {}, "hh"),
        (HH | {"prompt": None}, {}, "hh"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, {}, "hh"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, "preference"),
        (PAIR, {}, "preference"),
        (PAIR | {"prompt": "q", "score_chosen": 1, "score_rejected": 0}, {}, "preference"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, {"prompt": "question"}, "preference"),
        ({"prompt": "q", "completion": "a", "label": True}, {}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": 0}, {}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": "True"}, {}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": None}, {}, "unpaired"),
        ({"prompt": "q", "completions": ["a", "b"]}, {}, "ranked"),
    ],
)
def test_detect(row, columns, name):
    found = detect(row, columns)
    assert found.name == name and "also looks like" not in found.reason


def test_detect_gives_its_reason_and_names_rivals():
    assert detect({"text": ""}).reason == "has a column 'text'"
    assert (
        detect({"question": "", "answer": ""}).reason == "columns 'question' and 'answer' read as prompt and completion"
    )
    mapped = detect({"q": "", "answer": ""}, {"question": "q"})
    assert mapped.reason == "columns 'q' and 'answer' read as prompt and completion"
    for row, name, rival in (
        ({"text": "", "messages": []}, "messages", "text"),
        (PAIR | {"messages": []}, "messages", "preference"),
        (HH | {"prompt": "\n\nHuman: q", "response": ""}, "hh", "question_answer"),
        ({"prompt": "", "completion": "", "answer": ""}, "prompt_completion", "question_answer"),
    ):
        found = detect(row)
        assert found.name == name
        assert f"it also looks like {rival}: set data.format to choose" in found.reason


@pytest.mark.parametrize(
    "row",
    [
        {"title": "q", "body": "a"},
        {"instruction": "", "context": "", "response": ""},  # the context would be lost
        {"instruction": "", "input": "", "response": ""},
        {"chosen": "a"},
        {"instruction": "", "input": ""},
    ],
)
def test_detect_says_what_it_looked_for(row):
    with pytest.raises(DataError) as error:
        detect(row)
    said = str(error.value)
    assert f"the columns {', '.join(row)}" in said and "data.columns" in said
    assert all(f"{name} (" in said for name in FORMATS)


def test_every_format_says_what_its_rows_are():
    kinds = {name: FORMATS.get(name).kind for name in FORMATS}
    assert {name for name, kind in kinds.items() if kind == "text"} == {"text"}
    assert {name for name, kind in kinds.items() if kind == "preference"} == {"hh", "preference", "ranked", "unpaired"}
    assert {name for name, kind in kinds.items() if kind == "chat"} >= {"messages", "sharegpt", "alpaca"}


@pytest.mark.parametrize(
    ("name", "row", "columns", "unread"),
    [
        ("messages", chat(USER, ANSWER) | {"id": 7, "tools": None}, {}, ["id"]),
        ("messages", chat(USER | {"name": "bob"}, ANSWER | {"audio": 1, "refusal": None}), {}, ["[].name", "[].audio"]),
        ("messages", chat(USER, {"role": "tool", "content": "", "name": "f", "tool_call_id": "1"}), {}, []),
        ("messages", chat({"role": "user", "content": [{"type": "text", "cache": 1}]}), {}, ["[].content[].cache"]),
        (
            "messages",
            chat(ANSWER | {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
            {},
            ["[].tool_calls[].index"],
        ),
        ("messages", chat(USER | {"x": 1}, ANSWER | {"x": 1}), {}, ["[].x"]),
        ("question_answer", {"query": "", "response": "", "id": 1}, {}, ["id"]),
        ("question_answer", {"q": "", "answer": "", "question": ""}, {"question": "q"}, ["question"]),
        ("question_answer", {"query": "", "response": "", "s": ""}, {"system": "s"}, []),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "", "text": "x", "html": None}]}, {}, ["[].text"]),
        (
            "preference",
            PAIR | {"chosen": [USER | {"x": 1}], "score_chosen": 1, "extra": 0},
            {},
            ["extra", "chosen[].x"],
        ),
        ("ranked", {"prompt": "", "completions": [[ANSWER | {"x": 1}], "a"]}, {}, ["completions[][].x"]),
    ],
)
def test_what_is_not_read_is_told(name, row, columns, unread):
    prefix = {"messages": "messages", "sharegpt": "conversations"}.get(name, "")
    expected = [prefix + key if key.startswith("[") else key for key in unread]
    assert unread_columns(name, row, columns) == expected


def test_question_and_answer_under_the_usual_names():
    gsm8k = parser("question_answer")({"question": "2 + 2?", "answer": "4\n#### 4"})
    assert gsm8k.prompt == (Message("user", "2 + 2?"),)
    assert gsm8k.completions == ((Message("assistant", "4\n#### 4"),),)
    columns = {"question": "frage", "answer": "antwort", "system": "rolle"}
    row = {"frage": "q", "antwort": "a", "rolle": "s", "question": "?", "answer": "!"}
    example = parser("question_answer", columns)(row)
    assert example.prompt == (Message("system", "s"), Message("user", "q"))
    assert example.completions == ((Message("assistant", "a"),),)
    assert parser("question_answer")({"query": "q", "response": "a", "system": ""}).prompt == (Message("user", "q"),)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "q", "answer": "a", "response": "b"},
            "more than one pair .* .question/answer, question/response.",
        ),
        ({"question": "q", "answer": None}, "answer is null, not a string"),
        ({"query": "q", "response": ["a"]}, "response is .'a'., not a string"),
        ({"question": "q", "reply": "a"}, "there is no column 'answer'"),
        ({"question": "q", "answer": "a", "system": 3}, "system is 3, not a string"),
    ],
)
def test_bad_question_answer_rows(row, said):
    with pytest.raises(DataError, match=said):
        parser("question_answer")(row)


def test_alpaca_is_an_instruction_its_input_and_its_history():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "s", "history": [["Hi", "Hello"]]}
    example = parser("alpaca")(row)
    assert example.prompt == (Message("system", "s"), Message("user", "Hi"))
    assert example.completions == (
        (Message("assistant", "Hello"), Message("user", "Add."), Message("input", "1, 2"), Message("assistant", "3")),
    )
    for bare in ({}, {"input": "", "system": "", "history": []}, {"input": None, "system": None, "history": None}):
        example = parser("alpaca")({"instruction": "Add.", "output": "3"} | bare)
        assert example.prompt == (Message("user", "Add."),)
        assert example.completions == ((Message("assistant", "3"),),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": " "}, "instruction is empty"),
        ({"output": None}, "output is null, not a string"),
        ({"input": 3}, "input is 3, not a string"),
        ({"history": "Hi"}, "history is 'Hi', not a list of pairs"),
        ({"history": [["Hi"]]}, "history.0. is .'Hi'., not a pair"),
        ({"history": [["Hi", "Hello"], ["a", 1]]}, "history.1. is 1, not a string"),
    ],
)
def test_bad_alpaca_rows(change, said):
    with pytest.raises(DataError, match=said):
        parser("alpaca")({"instruction": "i", "output": "o"} | change)


def test_an_alpaca_input_reaches_a_template_that_has_no_place_for_it(tokenizer):
    example = parser("alpaca")({"instruction": "Add.", "input": "1, 2", "output": "3"})
    (sample,) = Renderer(tokenizer, TEMPLATES["llama3"]).render(example)
    assert "Add.\n\n1, 2<|eot_id|>" in tokenizer.decode(sample.ids())
    trained = [tokenizer.decode(span.ids) for span in sample.trunk if span.trained]
    assert trained == ["3<|eot_id|>"]


def test_sharegpt_is_a_chat_in_other_words():
    said = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "r"), ("assistant", "b")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said]}
    row["conversations"][2] |= {"train": False, "weight": None}
    row["conversations"][4] |= {"weight": 0.5}
    example = parser("sharegpt")(row)
    assert example.prompt == (Message("system", "s"), Message("user", "q"))
    assert example.completions == (
        (Message("assistant", "a", False), Message("user", "r"), Message("assistant", "b", weight=0.5)),
    )
    apart = parser("sharegpt")({"conversations": row["conversations"][1:], "system": "s", "tools": ""})
    assert apart == example


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": []}, "conversations is [], not a list"),
        ({"conversations": [HUMAN]}, "no assistant turn"),
        ({"conversations": [HUMAN, "a"]}, "conversations[1] is 'a', not an object with from and value"),
        ({"conversations": [USER, ANSWER]}, "are read by data.columns: {messages: conversations}"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "text": "a"}]},
            "conversations[1] has no 'value'; it has from, text",
        ),
        ({"conversations": [{"from": "bing", "value": "q"}, GPT]}, "conversations[0].from is 'bing'; allowed: system"),
        ({"conversations": [HUMAN, GPT | {"value": None}]}, "conversations[1].value is null, not a string"),
        ({"conversations": [HUMAN, GPT | {"train": 1}]}, "conversations[1].train is 1; write true or false"),
        ({"conversations": [{"from": "system", "value": "t"}, HUMAN, GPT], "system": "s"}, "remove one of them"),
        (
            {"conversations": [HUMAN, GPT | {"from": "function_call"}]},
            "conversations[1].value is 'a', which is no JSON",
        ),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]}, "calls no function"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "f"}'}]}, "[0] has no 'arguments'"),
    ],
)
def test_bad_sharegpt_rows(row, said):
    with pytest.raises(DataError) as error:
        parser("sharegpt")(row)
    assert said in str(error.value)
