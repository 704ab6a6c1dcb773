"""Tools, calls and results in a row keep their JSON: to the byte through `tojson`, and nothing is added or guessed."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.conversations import CONVERSATIONS
from tuner.data.formats import ArrowRow, parser
from tuner.data.source import rows
from tuner.data.templates import as_openai, tojson
from tuner.errors import DataError
from tuner.recipe import DataSource
from tuner.types import Message, ToolCall

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def call(arguments, name="f", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def calling(*calls, **more):
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": list(calls)} | more]}


def parsed(row):
    return parser("messages")(row).completions[0][0].tool_calls


def test_a_conversation_with_tools():
    row = {
        "tools": [SCHEMA],
        "messages": [
            USER,
            calling(call('{"x": 1}', id="c1"), call({"x": 2}, "g", id="c2"))["messages"][1] | {"weight": 0.5},
            {"role": "tool", "content": "one", "name": "f", "tool_call_id": "c1", "train": False},
            {"role": "tool", "content": [{"type": "text", "text": "two"}], "tool_call_id": "c2"},
            ANSWER,
        ],
    }
    example = parser("messages")(row)
    assert example.tools == (SCHEMA,) and example.prompt == (Message("user", "q"),)
    assert example.completions == (
        (
            Message("assistant", "", None, 0.5, (ToolCall("f", {"x": 1}, "c1"), ToolCall("g", {"x": 2}, "c2"))),
            Message("tool", "one", False, name="f", call_id="c1"),
            Message("tool", "two", call_id="c2"),
            Message("assistant", "a"),
        ),
    )


def test_content_beside_calls_may_be_null_absent_or_text():
    for content, expected in ((None, ""), ("", ""), ("I look.", "I look.")):
        (message,) = parser("messages")(calling(call({}), content=content)).completions[0]
        assert message.content == expected and message.tool_calls == (ToolCall("f", {}),)
    absent = calling(call({}))
    del absent["messages"][1]["content"]
    assert parser("messages")(absent) == parser("messages")(calling(call({})))
    for none in (None, []):
        assert (
            parser("messages")({"messages": [USER, ANSWER | {"tool_calls": none}]}).completions[0][0].tool_calls == ()
        )


@pytest.mark.parametrize("row", CONVERSATIONS, ids=[row["name"] for row in CONVERSATIONS])
def test_golden_conversations_come_out_as_they_went_in(row):
    example = parser("messages")({"messages": row["messages"], "tools": row.get("tools")})
    back = [as_openai(m) for m in (*example.prompt, *example.completions[0])]
    wanted = [m | {"content": m.get("content") or ""} for m in row["messages"]]
    assert json.loads(tojson(back)) == json.loads(tojson(wanted))
    assert tojson(list(example.tools)) == tojson(row.get("tools") or [])


def value(draw, depth=0):
    kinds = ["null", "bool", "int", "float", "text", "text", *(["list", "object"] if depth < 3 else [])]
    kind = draw.choice(kinds)
    if kind == "list":
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == "object":
        return arguments(draw, depth + 1)
    return {
        "null": None,
        "bool": draw.random() < 0.5,
        "int": draw.choice((0, -1, 7, 10**18, 2**70)),
        "float": draw.choice((0.5, -1e-9, 1.0, 3.141592653589793, 1e22)),
        "text": text(draw),
    }[kind]


def text(draw):
    return "".join(draw.choice('aZ0 "\\/\n\t\x00\u2028é你🙂</>{}') for _ in range(draw.randrange(6)))


def arguments(draw, depth=0):
    return {text(draw) + str(i): value(draw, depth) for i in draw.sample(range(9), draw.randrange(5))}


def test_random_arguments_keep_every_byte(write):
    draw = random.Random(0)
    sources = [arguments(draw) for _ in range(500)]
    assert sum("null" in tojson(a) for a in sources) > 50
    path = write(
        [calling(call(a), call(json.dumps(a)), call(tojson(a))) | {"tools": [SCHEMA | {"x": a}]} for a in sources]
    )
    for (_, row), given in zip(rows(DataSource(path=path)), sources, strict=True):
        example = parser("messages")(row)
        for found in example.completions[0][0].tool_calls:
            assert tojson(found.arguments) == json.dumps(given, ensure_ascii=False)
        assert tojson(example.tools[0]["x"]) == json.dumps(given, ensure_ascii=False)


def test_no_key_is_added_and_no_null_is_lost(write):
    path = write([calling(call({"a": 1})), calling(call({"c": [], "b": None}))])
    found = [tojson(parsed(row)[0].arguments) for _, row in rows(DataSource(path=path))]
    assert found == ['{"a": 1}', '{"c": [], "b": null}']


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "arguments has the key 'a' twice in one object"),
        ('{"x": [{"a": 1, "a": 1}]}', "arguments has the key 'a' twice in one object"),
        ('{"a": 1', "arguments is '{\"a\": 1', which is no JSON"),
        ("[1]", "arguments is '[1]', not a JSON object; write {} for a call without arguments"),
        ('"{}"', "not a JSON object"),
        ("", "arguments is '', not a JSON object"),
        (None, "arguments is null, not a JSON object"),
        ([["a", 1]], "arguments is [['a', 1]], not a JSON object"),
        ('{"a": NaN}', "arguments holds NaN, which is no JSON"),
        ('{"a": 1e999}', "arguments holds what JSON has no place for"),
        ({"a": float("inf")}, "arguments holds what JSON has no place for"),
        ({"a": b"x"}, "arguments holds what JSON has no place for"),
        ({"a": "\ud800"}, "arguments holds half of a surrogate pair"),
        ('{"a": "\\ud800"}', "arguments holds half of a surrogate pair"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_arguments_that_are_no_json_object_are_refused(given, said):
    with pytest.raises(DataError) as error:
        parsed(calling(call({}), call(given)))
    assert said in str(error.value) and "messages[1].tool_calls[1].function.arguments" in str(error.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER | {"tool_calls": [call({})]}, ANSWER], "messages[0] has 'tool_calls' in a user turn"),
        ([USER, ANSWER | {"tool_calls": "f()"}], "messages[1].tool_calls is 'f()', not a list of calls"),
        ([USER, ANSWER | {"tool_calls": ["f"]}], "messages[1].tool_calls[0] is 'f', not an object with name"),
        ([USER, ANSWER | {"tool_calls": [call({}, type="web")]}], "tool_calls[0].type is 'web'"),
        ([USER, ANSWER | {"tool_calls": [{"function": {"arguments": {}}}]}], "[0].function has no 'name'; it has arg"),
        ([USER, ANSWER | {"tool_calls": [{"name": "f"}]}], "tool_calls[0] has no 'arguments'; it has name"),
        ([USER, ANSWER | {"tool_calls": [call({}, name="")]}], "tool_calls[0].function.name is empty"),
        ([USER, ANSWER | {"tool_calls": [call({}, id=3)]}], "tool_calls[0].id is 3, not a string"),
        ([USER, ANSWER | {"function_call": {"name": "f"}}], "messages[1] has 'function_call'"),
        ([USER, ANSWER, {"role": "tool", "content": None}], "messages[2].content is null"),
        ([USER, ANSWER, {"role": "tool", "content": "", "tool_call_id": 1}], "messages[2].tool_call_id is 1"),
        ([USER, ANSWER, {"role": "tool", "content": "", "name": ["f"]}], "messages[2].name is ['f']"),
    ],
)
def test_bad_calls_and_results_are_refused(messages, said):
    with pytest.raises(DataError) as error:
        parser("messages")({"messages": messages})
    assert said in str(error.value)


def test_tools_may_be_objects_strings_or_one_string():
    bare = {"name": "g", "description": None, "parameters": {}}
    for given in ([SCHEMA, bare], [json.dumps(SCHEMA), json.dumps(bare)], json.dumps([SCHEMA, bare])):
        for name, row in (
            ("messages", {"messages": [USER, ANSWER]}),
            ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}),
            ("prompt_completion", {"prompt": "q", "completion": "a"}),
            ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
            ("unpaired", {"prompt": "q", "completion": "a", "label": True}),
            ("ranked", {"prompt": "q", "completions": ["a", "b"]}),
        ):
            found = parser(name)(row | {"tools": given}).tools
            assert [tojson(t) for t in found] == [tojson(SCHEMA), tojson(bare)]
    for none in (None, [], "", " ", "[]"):
        assert parser("messages")({"messages": [USER, ANSWER], "tools": none}).tools == ()


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (SCHEMA, "not a list of function schemas"),
        ("hammer", "tools is 'hammer', which is no JSON"),
        (["hammer"], "tools[0] is 'hammer', which is no JSON"),
        ([SCHEMA, {"type": "web_search"}], "tools[1] is {'type': 'web_search'}, not the schema of a function"),
        ([{"function": {"description": "d"}}], "not the schema of a function"),
        ('[{"name": "f", "name": "g"}]', "tools has the key 'name' twice"),
        ([SCHEMA | {"x": float("nan")}], "tools[0] holds what JSON has no place for"),
    ],
)
def test_bad_tools_are_refused(tools, said):
    with pytest.raises(DataError) as error:
        parser("messages")({"messages": [USER, ANSWER], "tools": tools})
    assert said in str(error.value)


def test_sharegpt_calls_functions_too():
    row = {
        "tools": json.dumps([SCHEMA]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"b": null, "a": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {}}]'},
            {"from": "tool", "value": "t"},
            {"from": "gpt", "value": "a"},
        ],
    }
    example = parser("sharegpt")(row)
    assert example.tools == (SCHEMA,)
    assert [m.role for m in example.completions[0]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    first, _, second, _, _ = example.completions[0]
    assert tojson(first.tool_calls[0].arguments) == '{"b": null, "a": 1}' and first.content == ""
    assert second.tool_calls == (ToolCall("f", {}), ToolCall("g", {}))


def from_parquet(tmp_path, table_rows):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(table_rows), path)
    return [row for _, row in rows(DataSource(path=str(path)))]


def test_parquet_with_arguments_as_strings_is_exact(tmp_path):
    given = ['{"a": 1}', '{"c": [], "b": null}']
    found = from_parquet(tmp_path, [calling(call(a)) | {"tools": [json.dumps(SCHEMA)]} for a in given])
    assert [tojson(parsed(row)[0].arguments) for row in found] == given
    assert parser("messages")(found[0]).tools == (SCHEMA,)


def test_parquet_objects_that_may_have_got_nulls_are_refused(tmp_path):
    for calls in ([{"a": 1}, {"b": 2}], [{"a": {"x": 1}}, {"a": {"y": 1}}], [{"a": [{"x": 1}, {"y": 2}]}]):
        for row in from_parquet(tmp_path, [calling(call(a)) for a in calls]):
            with pytest.raises(
                DataError, match=r"messages\[1\].tool_calls\[0\].function.arguments holds a null.*string"
            ):
                parsed(row)
    tools = [SCHEMA, SCHEMA | {"strict": True}]
    (row,) = from_parquet(
        tmp_path, [{"messages": [USER, ANSWER], "tools": [{"name": "f"}, {"name": "g", "strict": True}]}]
    )
    with pytest.raises(DataError, match=r"tools\[0\] holds a null"):
        parser("messages")(row)
    assert parser("messages")({"messages": [USER, ANSWER], "tools": tools}).tools == tuple(tools)


def test_parquet_objects_without_nulls_are_what_the_row_says(tmp_path):
    for row, given in zip(from_parquet(tmp_path, [calling(call({"a": n})) for n in (1, 2)]), (1, 2), strict=True):
        assert isinstance(row, ArrowRow) and tojson(parsed(row)[0].arguments) == f'{{"a": {given}}}'
    # keys of a message that another row has are null here, which means that they are absent
    mixed = [{"messages": [USER, ANSWER | {"train": False}]}, calling(call({"a": 1}, id="c"))]
    plain, called = (parser("messages")(row) for row in from_parquet(tmp_path, mixed))
    assert plain.completions == ((Message("assistant", "a", False),),)
    assert called.completions == ((Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}, "c"),)),),)
