"""OpenAI rows -> examples, and what templates make of them: for the tests of templates."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

from tuner.data.templates import BOS, EOS, as_openai
from tuner.types import ANSWERS, Example, Message, ToolCall

# What contents are made of to find where blanks, scripts or marks change ids: none of it spells a control token.
# fmt: off
ODD = [
    "a", "the", "answer", " ", "  ", "\n", "\n\n", "\t", "\r\n", "12345", ".",
    "?!", "<|", "|>", "'s", "ü", "e\u0301", "你好", "🦙", "👩‍👩‍👧", "\u200b", "\u00a0",
    "\u2028", "٣", "_id", "end", "x = 1\n    y", "\x00", "\x85", "\ufeff", '"', "\\", "{",
]
# fmt: on


def as_messages(rows):
    """OpenAI rows as a format parses them."""
    return [
        Message(
            row["role"],
            row["content"] or "",
            row.get("train"),
            row.get("weight", 1.0),
            tuple(
                ToolCall(c["function"]["name"], c["function"]["arguments"], c["id"]) for c in row.get("tool_calls", ())
            ),
            row.get("name"),
            row.get("tool_call_id"),
        )
        for row in rows
    ]


def as_example(row):
    messages = tuple(as_messages(row["messages"]))
    first = next((i for i, m in enumerate(messages) if m.role in ANSWERS), len(messages))
    return Example(messages[:first], (messages[first:],), tools=tuple(row.get("tools", ())))


def template_for(template, row):
    """The template, with the row's date if it has such an option."""
    if "date_string" in row and "date_string" in inspect.signature(template.pieces).parameters:
        return template.with_options({"date_string": row["date_string"]})
    return template


def has_place(template, row):
    """Whether the Renderer lets the row through to the template at all."""
    calls = "tools" in row or any("tool_calls" in m for m in row["messages"])
    return all(m["role"] in template.roles for m in row["messages"]) and (template.tools or not calls)


def text_of(template, tokenizer, row, generate=False):
    names = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token}
    pieces = template.pieces(as_messages(row["messages"]), generate, tools=tuple(row.get("tools", ())))
    return "".join(names.get(p.text, p.text) if p.control else p.text for p in pieces)


def by_jinja(tokenizer, jinja, row, generate=False, **more):
    messages = [as_openai(m) for m in as_messages(row["messages"])]
    return tokenizer.apply_chat_template(
        messages, row.get("tools"), chat_template=jinja, add_generation_prompt=generate, **more
    )


def trained_runs(tokens):
    """Where the trained runs of a document begin and end."""
    runs, at = [], 0
    for span in tokens.trunk:
        if span.trained:
            runs.append([at, at + len(span.ids)])
        at += len(span.ids)
    return runs


def _official(name):
    """A text of Meta's, as the installed `trl` package carries it."""
    package = importlib.util.find_spec("trl")
    path = Path(package.submodule_search_locations[0]) / "chat_templates" / f"{name.replace('.', '_')}.jinja"
    return path.read_text(encoding="utf-8")


OFFICIAL = {name: _official(name) for name in ("llama3", "llama3.1", "llama3.2")}
