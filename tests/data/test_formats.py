from __future__ import annotations

import pytest

from tuner.data.formats import FORMATS, detect, parser
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
        ([{"role": "tool", "content": "q"}, ANSWER], "messages[0].role is 'tool'"),
        ([{"role": "user<|eot_id|>", "content": "q"}, ANSWER], "messages[0].role is 'user<|eot_id|>'"),
        ([{"role": None, "content": "q"}, ANSWER], "messages[0].role is null"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null, not a string"),
        ([USER, {"role": "assistant", "content": ["a"]}], "messages[1].content is ['a'], not a string"),
        ([USER, ANSWER | {"content": "\ud800"}], "half of a surrogate pair"),
        ([USER, ANSWER | {"tool_calls": [{"id": 1}]}], "messages[1] has 'tool_calls'"),
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
    with pytest.raises(RecipeError, match="reads no 'promt' .did you mean 'prompt'.*it reads: prompt, completion"):
        parser("prompt_completion", {"promt": "question"})
    with pytest.raises(RecipeError, match="unknown data format 'message' .did you mean 'messages'"):
        parser("message")


@pytest.mark.parametrize(
    ("row", "columns", "name"),
    [
        ({"messages": []}, {}, "messages"),
        ({"prompt": "", "completion": ""}, {}, "prompt_completion"),
        ({"text": ""}, {}, "text"),
        ({"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"body": "", "messages": []}, {"text": "body"}, "text"),
        ({"prompt": "", "prompt_id": "", "messages": []}, {}, "messages"),
    ],
)
def test_detect(row, columns, name):
    assert detect(row, columns).name == name


def test_detect_gives_its_reason_and_names_rivals():
    assert detect({"text": ""}).reason == "has a column 'text'"
    assert "also looks like text" in detect({"text": "", "messages": []}).reason


def test_detect_says_what_it_looked_for():
    with pytest.raises(DataError) as error:
        detect({"question": "q", "answer": "a"})
    said = str(error.value)
    assert "the columns question, answer" in said and "data.columns" in said
    assert all(f"{name} (" in said for name in FORMATS)
