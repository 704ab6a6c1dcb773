"""Conversations -> what every golden file renders: OpenAI rows, each under a name that says what is odd about it.

A row has `messages`, and `tools` and `date_string` where it needs them. A template need not have a place for every row.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _turns(*contents: str, system: str | None = None) -> list[Row]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def _chat(name: str, *contents: str, system: str | None = None, **more: Any) -> Row:
    return {"name": name, "messages": _turns(*contents, system=system), **more}


def _call(name: str, arguments: Row, call_id: str = "call00001") -> Row:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _calls(*calls: Row, content: str | None = None) -> Row:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def _result(content: str, name: str, call_id: str = "call00001") -> Row:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": call_id}


def _function(name: str, description: str, properties: Row, required: list[str]) -> Row:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = _function(
    "get_weather",
    "The weather in a city, now.",
    {"city": {"type": "string", "description": "Name, e.g. Paris"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    ["city"],
)
ADD = _function("add", "Adds two numbers.", {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"])
SEARCH = _function(
    "suche_中文",
    'Finds "things" — größer, 你好, <b>&amp;</b>',
    {"filter": {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}},
    [],
)
NESTED = {"filter": {"tags": ["a", "b"], "before": None, "exact": False}, "page": 2, "ratio": 0.5, "note": None}
ASK = {"role": "user", "content": "What is the weather in Paris?"}
SUNNY = _result('{"celsius": 21}', "get_weather")
PARIS = _call("get_weather", {"city": "Paris"})

CONVERSATIONS: list[Row] = [
    # system, no system, several turns
    _chat("one turn", "Hello", "Hi there"),
    _chat("system", "What is 2 + 2?", "4", system="Be brief."),
    _chat("two turns", "a", "b", "c", "d"),
    _chat("three turns", "a", "b", "c", "d", "e", "f"),
    _chat("system and two turns", "a", "b", "c", "d", system="You answer in one word."),
    _chat("eight turns", *(f"turn {i}" for i in range(16))),
    _chat("ends with the user", "a", "b", "thanks"),
    _chat("system, ends with the user", "a", "b", "thanks", system="s"),
    _chat("long system", "Hi", "Hello.", system="You are the help desk of a library. " * 6),
    _chat("system of several lines", "Hi", "Hello.", system="Rules:\n1. Be kind.\n2. Be brief.\n\nNow begin."),
    _chat("a long answer", "Tell me a story.", "Once upon a time there was a llama. " * 12),
    _chat("a long question", "Is this long? " * 20, "Yes."),
    _chat("numbers", "1 2 3 4 5", "6 7 8 9 10 1000000 3.14159 -1e-9 0x1F"),
    _chat("a table", "Make a table.", "| a | b |\n|---|---|\n| 1 | 2 |"),
    _chat("a list", "Three colours?", "- red\n- green\n- blue\n", "Shorter.", "* red\n* blue"),
    _chat("addresses", "https://example.org/a?b=c&d=%20#e", "me@example.org, /usr/bin, C:\\x"),
    # nothing at all
    _chat("empty question", "", "What do you want to know?"),
    _chat("empty answer", "Say nothing.", ""),
    _chat("all empty", "", "", system=""),
    _chat("empty system", "Hello", "Hi", system=""),
    _chat("blank contents", " ", " \n ", system="\t"),
    _chat("empty later turn", "a", "b", "", "d"),
    # scripts
    _chat("accents", "Größe, naïve, Łódź?", "Élan — ça va"),
    _chat("Chinese", "你好，世界", "你好！", system="你是一个助手。"),
    _chat("right to left", "مرحبا", "שלום"),
    _chat("emoji", "🙂 🦙🏽 👩‍👩‍👧", "🇫🇷 ok 🙂"),
    _chat("combining marks", "e\u0301 \u0928\u093f", "n\u0303o"),
    _chat("digits of other scripts", "٣٤ and 12,345.67", "१२३"),
    _chat("odd blanks inside", "a\u00a0b\u2003c\u200bd", "x\u3000y\u2028z"),
    _chat("odd blanks around", "\u00a0a\u3000", "\u2003b\u00a0", system="\u2028s\u2029"),
    _chat("zero width around", "\u200ba\ufeff", "\u200bb\u200b"),
    _chat("control characters", "a\x00b\x07", "c\x1bd\x7f"),
    _chat("a system of emoji", "🦙?", "🦙!", system="🦙🦙🦙"),
    _chat("capitals and marks", "DON'T! WE'LL? İstanbul ß ẞ", "(…) „quoted“ ‹no›, 5 % ½"),
    # blanks and newlines
    _chat("blanks around", "  two  blanks  ", "   b   ", system=" s "),
    _chat("newlines around", "\n\nq\n\n", "\na\n", system="\n\ns\n"),
    _chat("tabs and returns", "\ta\r\n", "\r\nb\t"),
    _chat("newlines inside", "a\n\n\nb", "1\r\n2\t3"),
    _chat("blanks around, two turns", " a ", " b ", "\nc\n", "\td\t", system=" s\n"),
    _chat("only the system has blanks", "a", "b", system="  lead and trail  \n"),
    # code, and text that looks like markup
    _chat("code", "Write add.", "def add(a, b):\n    return a + b\n"),
    _chat("code that begins with an indent", "Go on.", "    return a + b\n\n\nprint(add(1, 2))"),
    _chat("fenced code", "Show it.", "Here:\n```python\nx = {'a': [1, 2]}\n```\nDone."),
    _chat("HTML", "<b>&amp;</b>", '<p class="x">It\'s fine</p>'),
    _chat("JSON as text", '{"a": 1}', '{"name": "f", "parameters": {}}'),
    _chat("Jinja as text", "{{ messages }} {% if x %}", "{# not a comment #} {{- y -}}"),
    _chat("a word of another template", "[INS] <<SY>> ### Instruct", "<|almost|> <s | >"),
    _chat("backslashes and quotes", r"C:\new\table 'a' \"b\"", 'it\'s "quoted" \\n not a newline'),
    # dates
    _chat("a date", "What day is it?", "The first of June.", date_string="01 Jun 2025"),
    _chat("a date and a system", "What day is it?", "Tuesday.", system="Be exact.", date_string="9 Feb 2021"),
    _chat("a date in other words", "And now?", "Today.", date_string="1er août 2024"),
    # tools
    _chat("tools, no call", "Hello", "Hi, what can I do?", tools=[WEATHER]),
    _chat("tools and a system, no call", " Hello ", "Hi", "Bye", "Bye!", system=" Use tools. ", tools=[WEATHER, ADD]),
    _chat("tools of odd names", "Find it.", "I did.", tools=[SEARCH]),
    _chat("tools and a date", "Hello", "Hi", tools=[ADD], date_string="01 Jun 2025"),
    {"name": "a call", "messages": [ASK, _calls(PARIS)], "tools": [WEATHER]},
    {
        "name": "a call and its result",
        "messages": [ASK, _calls(PARIS), SUNNY, {"role": "assistant", "content": "It is 21 °C."}],
        "tools": [WEATHER],
    },
    {
        "name": "a call with empty content",
        "messages": [ASK, _calls(PARIS, content=""), SUNNY, {"role": "assistant", "content": "Warm."}],
        "tools": [WEATHER],
    },
    {
        "name": "a call, system, and on with the talk",
        "messages": [
            {"role": "system", "content": "Use tools."},
            ASK,
            _calls(PARIS),
            SUNNY,
            *(
                {"role": r, "content": c}
                for r, c in (("assistant", " Warm. "), ("user", "Thanks"), ("assistant", ":)"))
            ),
        ],
        "tools": [WEATHER, ADD],
    },
    {
        "name": "calls one after the other",
        "messages": [
            {"role": "user", "content": "Add 1 and 2, then 3."},
            _calls(_call("add", {"a": 1, "b": 2})),
            _result("3", "add"),
            _calls(_call("add", {"a": 3, "b": 3}, "call00002")),
            _result("6", "add", "call00002"),
            {"role": "assistant", "content": "6"},
        ],
        "tools": [ADD],
    },
    {
        "name": "nested arguments with nulls",
        "messages": [{"role": "user", "content": "Find it."}, _calls(_call("suche_中文", NESTED))],
        "tools": [SEARCH],
    },
    {
        "name": "no arguments",
        "messages": [
            {"role": "user", "content": "Find all."},
            _calls(_call("suche_中文", {})),
            _result("", "suche_中文"),
        ],
        "tools": [SEARCH],
    },
    {
        "name": "a result of several lines",
        "messages": [ASK, _calls(PARIS), _result(' "two"\nlines \\ 你好\n', "get_weather"), _calls(PARIS)],
        "tools": [WEATHER],
    },
    {
        "name": "several calls in one turn",
        "messages": [
            {"role": "user", "content": "Paris and Rome?"},
            _calls(PARIS, _call("get_weather", {"city": "Rome"}, "call00002")),
            SUNNY,
            _result('{"celsius": 25}', "get_weather", "call00002"),
            {"role": "assistant", "content": "21 and 25."},
        ],
        "tools": [WEATHER],
    },
    {
        "name": "text beside a call",
        "messages": [ASK, _calls(PARIS, content="I shall look."), SUNNY, {"role": "assistant", "content": "21."}],
        "tools": [WEATHER],
    },
    {
        "name": "a call without its schema",
        "messages": [ASK, _calls(PARIS), SUNNY, {"role": "assistant", "content": "Warm."}],
    },
]


def _verdicts() -> list[Row]:
    """Llama Guard: each harmless dialogue with a verdict on its last turn, and a few verdicts that are none."""
    given = ["safe", "unsafe\nS1", "unsafe\nS2,S10", " safe\n", "unsafe\nS14,S9,S1", "\nunsafe\nS7 "]
    plain = [r["messages"] for r in CONVERSATIONS if "tools" not in r and r["messages"][0]["role"] == "user"]
    dialogues = [cut for m in plain if "tool_calls" not in m[1] for cut in (m, m[:-1])]
    rows = [
        {"name": f"verdict {n} on {m[-1]['role']}", "messages": [*m, _verdict(given[n % len(given)])]}
        for n, m in enumerate(dialogues)
    ]
    asked = _turns("How do I pick a lock?")
    wrong = [
        "Safe",
        "safe\nS1",
        "unsafe",
        "unsafe\nS15",
        "unsafe\nS1, S2",
        "unsafe\nS1,S1",
        "unsafe\n",
        "unsafe S1",
        "",
    ]
    rows += [{"name": f"no verdict: {text!r}", "messages": [*asked, _verdict(text)]} for text in wrong]
    rows.append({"name": "no verdict at all", "messages": [_verdict("safe")]})
    rows.append({"name": "a verdict with a system", "messages": [*_turns("a", system="s"), _verdict("safe")]})
    rows.append({"name": "a verdict after two users", "messages": [*asked, *asked, _verdict("safe")]})
    return rows


def _verdict(text: str) -> Row:
    return {"role": "assistant", "content": text}


def _code(name: str, prefix: str, suffix: str, middle: str) -> Row:
    parts = {"prefix": prefix, "suffix": suffix, "middle": middle}
    return {"name": name, "messages": [{"role": role, "content": text} for role, text in parts.items()]}


def _instruction(name: str, instruction: str, about: str, response: str, *more: Row) -> Row:
    parts = {"user": instruction, "input": about, "assistant": response}
    return {"name": name, "messages": [*({"role": r, "content": t} for r, t in parts.items()), *more]}


# More rows, of templates that need their own: template -> rows.
EXTRA: dict[str, list[Row]] = {
    "llama_guard": _verdicts(),
    "codellama": [
        _code("infilling", "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n", "a + b"),
        _code("infilling with blanks", " x = ", "  # end ", "  1 "),
        _code("infilling of an empty prefix", "", "\nreturn x", "x = 1"),
        _code("infilling of an empty suffix", "x = ", "", "1\n"),
        _code("infilling of an empty middle", "a", "b", ""),
        _code("infilling of scripts", "s = '你好", "🦙'\n", "，世界"),
    ],
    "alpaca": [
        _instruction("an input", "Add them.", "1 and 2", "3"),
        _instruction("an input with blanks", " Add\n", "\n1, 2 ", " 3\n"),
        _instruction(
            "an input in two turns",
            "Add them.",
            "1 and 2",
            "3",
            {"role": "user", "content": "And these."},
            {"role": "input", "content": "3 and 4"},
            {"role": "assistant", "content": "7"},
        ),
        {
            "name": "an input after a system",
            "messages": [
                {"role": "system", "content": "Be brief."},
                *_instruction("", "Add them.", "1 and 2", "3")["messages"],
            ],
        },
    ],
}
