"""A chat template that nobody here knows -> pieces: its Jinja as given, its answers by verified prefix differences.

The Jinja runs in a process of its own (see `tuner.data.foreign.jinja`). Of the answer at `i`, what a model is given to
generate it is `messages[:i]` with a generation prompt, and what it should have generated is what `messages[:i + 1]` has
more. That is the answer only if the former is a prefix of the latter, and the latter of the whole chat; a row where one
is not is refused, and so is a template none of whose chats pass. An answer ends with its last control token.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.data.foreign import sandbox
from tuner.data.foreign.jinja import SECONDS, Fatal, Process, Refused
from tuner.data.foreign.literal import Control, Hidden, Lost, Splitter, strings
from tuner.data.templates import Piece, Template, as_openai
from tuner.errors import DataError, ModelError
from tuner.types import Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "own"  # what messages and manifests call it
DATE = "26 Jul 2024"  # of Llama 3.1's and 3.2's templates where they are not told one


def foreign_template(jinja: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """A template that renders `jinja` as it is.

    It knows the roles, and tools, that come out of a trial rendering. What it saves is `jinja` unchanged.

    Raises:
        ModelError: the Jinja is not valid, takes too long or too much, depends on the day, or does not say where its
            answers begin or end; `str` says which, and what to do.
    """
    foreign = _Foreign(jinja, tokenizer)
    try:
        found = foreign.try_out()
    except Refused as refused:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} is none that tuner knows, and {refused}; set "
            "data.chat_template to one that tuner knows"
        ) from None
    return Template(
        name=NAME,
        jinja=jinja,
        control=found.control,
        terminators=found.terminators,
        roles=found.roles,
        pieces=foreign.pieces,
        tools=found.tools,
    )


@dataclass(frozen=True)
class _Found:
    """What trial renderings show of a template."""

    control: tuple[str, ...]
    terminators: tuple[str, ...]
    roles: tuple[str, ...]
    tools: bool


@dataclass(frozen=True)
class _Row:
    """One rendered chat, with placeholders for what spells control tokens."""

    text: str
    controls: list[Control]
    ends: list[int | None]  # [messages + 1] length of each beginning, where it is one
    prompts: list[int | None]  # [messages] length of each answer's prompt, where it is one
    hidden: Hidden


@dataclass(frozen=True)
class _Answer:
    """Where an answer is in the text: from the end of its prompt up to and with its terminator."""

    start: int
    stop: int
    terminator: str


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "trialtool",
            "description": "Tells a number.",
            "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "Of what."}}},
        },
    }
]
_ASK, _REPLY = Message("user", "trialquestion"), Message("assistant", "trialanswer")
_SYSTEM, _RESULT = (
    Message("system", "trialsystem"),
    Message("tool", "trialresult", name="trialtool", call_id="trialcall"),
)
# nine letters and digits, as Mistral's templates want an id
_CALL = Message("assistant", "", tool_calls=(ToolCall("trialtool", {"of": "trialvalue"}, "trialcall"),))
_PLAIN, _WITH_SYSTEM = (_ASK, _REPLY), (_SYSTEM, _ASK, _REPLY)
_WITH_RESULT, _WITH_CALL = (_ASK, _REPLY, _RESULT, _REPLY), (_ASK, _CALL, _RESULT, _REPLY)


class _Foreign:
    """One template of one tokenizer, with the process that renders it."""

    def __init__(self, jinja: str, tokenizer: PreTrainedTokenizerFast) -> None:
        variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if "strftime_now" in jinja and "date_string" in jinja:
            variables["date_string"] = DATE
        self._jinja, self._bos = jinja, tokenizer.bos_token
        self._terminators: tuple[str, ...] = ()
        self._splitter = Splitter(tokenizer)
        self._process = Process(jinja, variables)

    def pieces(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Piece]:
        """Text is cut where generation prompts end, and nowhere else unless messages are trained differently.

        A message that has no stretch of its own in the text counts with the next one.

        Raises:
            DataError: the template refuses the chat, drops or changes a part of it, or where an answer of it begins or
                ends cannot be told. A prompt to generate from must only be written in full.
        """
        try:
            row = self._render(messages, tools, add_generation_prompt, SECONDS)
            if missing := _unwritten(row, messages, tools):
                raise Refused(f"does not write {missing} as it stands")
            answers: dict[int, _Answer] = {}
            for i, message in enumerate(messages):
                if message.role != "assistant":
                    continue
                try:
                    answers[i] = self._answer(row, i)
                except Refused:
                    if not add_generation_prompt:
                        raise
            return self._cut(row, messages, answers)
        except Refused as refused:
            raise DataError(
                f"the tokenizer's own chat template {refused}; change the row, or set data.chat_template to one that "
                "tuner knows"
            ) from None

    def try_out(self) -> _Found:
        """Renders chats of each kind; the plain one, or the one with a system message, must pass."""
        deadline = time.monotonic() + SECONDS
        self._process.start(SECONDS)
        shapes = {"plain": _PLAIN, "system": _WITH_SYSTEM, "result": _WITH_RESULT, "call": _WITH_CALL}
        rows: dict[str, _Row] = {}
        ends: dict[str, list[_Answer]] = {}
        why: list[Refused] = []
        for name, messages in shapes.items():
            tools = _TOOLS if name == "call" else ()
            try:
                row = self._render(messages, tools, False, max(0.3, deadline - time.monotonic()))
                if missing := _unwritten(row, messages, tools):
                    raise Refused(f"does not write {missing}")
                rows[name] = row
                answers = [self._answer(row, i) for i, m in enumerate(messages) if m.role == "assistant"]
                if name in ("plain", "system"):
                    _check_prompt(row, len(messages) - 1, answers[-1])
                ends[name] = answers
            except Fatal:
                raise
            except Refused as refused:
                why.append(refused)
        if "plain" not in ends and "system" not in ends:
            raise why[0]
        roles = {
            "system": "system" in rows,
            "user": True,
            "assistant": True,
            "tool": bool({"result", "call"} & {*rows}),
        }
        self._terminators = tuple(dict.fromkeys(a.terminator for found in ends.values() for a in found))
        return _Found(
            tuple(dict.fromkeys(c.token for row in rows.values() for c in row.controls)),
            self._terminators,
            tuple(role for role, known in roles.items() if known),
            "call" in rows,
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        seconds: float,
    ) -> _Row:
        rows = [as_openai(m) for m in messages]
        if sum(map(len, strings([rows, tools]))) > sandbox.MAX_TEXT:
            raise Refused(f"is not given a row of more than {sandbox.MAX_TEXT:,} characters")
        hidden = Hidden(self._splitter, rows, tools, self._jinja)
        twin = hidden.twin()
        found = self._process.ask(
            {
                "messages": hidden.messages,
                "tools": hidden.tools or None,
                "twin": twin,
                "add_generation_prompt": add_generation_prompt,
                "seconds": seconds,
            }
        )
        try:
            found["text"].encode()
        except UnicodeEncodeError:
            raise Refused("writes half of a surrogate pair, which is no text") from None
        row = _Row(found["text"], self._splitter.split(found["text"]), found["ends"], found["prompts"], hidden)
        try:
            hidden.check(row.text)
        except Lost:
            raise Refused("does not write a text that spells a control token once, as it stands") from None
        if twin is not None:
            harmless = self._splitter.split(found["twin"])
            if [c.token for c in harmless] != [c.token for c in row.controls]:
                raise Refused("turns text of the chat into control tokens")
            if any(name not in found["twin"] for name in hidden.names):
                raise Refused("does not write each tool call")
        return row

    def _answer(self, row: _Row, i: int) -> _Answer:
        """The answer of message `i`."""
        start, end = row.prompts[i], row.ends[i + 1]
        if end is None:
            raise Refused(
                f"renders message {i} (assistant) otherwise when more messages follow, so that what a model should "
                "learn from it cannot be told"
            )
        if start is None:
            raise Refused(
                f"renders the beginning of message {i} (assistant) otherwise than its generation prompt, so that what "
                "a model should learn from it cannot be told"
            )
        if any(c.inner < p < c.end for c in row.controls for p in (start, end)):
            raise Refused(f"cuts a control token at the beginning or end of message {i} (assistant)")
        inside = [c for c in row.controls if start <= c.inner and c.end <= end]
        if not inside or row.text[inside[-1].end : end].strip():
            raise Refused(
                f"does not end message {i} (assistant) with a control token of this tokenizer, so that a model would "
                "never learn to stop"
            )
        last = inside[-1]
        if self._terminators and last.token not in self._terminators:
            raise Refused(f"ends message {i} (assistant) with {last.token}, and other answers with another token")
        return _Answer(start, last.end, last.token)

    def _cut(self, row: _Row, messages: Sequence[Message], answers: Mapping[int, _Answer]) -> list[Piece]:
        """The pieces of a row."""
        known = {k: end for k, end in enumerate(row.ends) if end is not None}
        begins = sorted((start, k) for k, start in ({k: a.start for k, a in answers.items()} | known).items())
        begins = [(start, k) for n, (start, k) in enumerate(begins) if not n or k > begins[n - 1][1]]
        starts = [start for start, _ in begins]
        cuts = {a.start for a in answers.values()} | {
            start for start, k in begins if 0 < k < len(messages) and _weight(messages[k]) != _weight(messages[k - 1])
        }

        def message(position: int) -> int | None:
            k = begins[bisect_right(starts, position) - 1][1]
            return k if k < len(messages) else None  # past the last message: a generation prompt

        def owner(position: int) -> int | None:
            return next((k for k, a in answers.items() if a.start <= position < a.stop), None)

        out: list[Piece] = []
        position = 0
        for control in [*row.controls, None]:
            until = control.start if control else len(row.text)
            for a, b in _between(position, until, cuts):
                out.append(Piece(_restored(row, a, b), owner=owner(a), message=message(b - 1)))
            if control:
                first = not out and control.token == self._bos
                out.append(Piece(control.token, True, owner(control.inner), None if first else message(control.inner)))
                position = control.stop
        return out


def _between(start: int, stop: int, cuts: set[int]) -> Iterator[tuple[int, int]]:
    bounds = [start, *sorted(c for c in cuts if start < c < stop), stop]
    return ((a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b)


def _restored(row: _Row, start: int, stop: int) -> str:
    try:
        return row.hidden.restore(row.text[start:stop])
    except Lost:
        raise Refused("cuts a text that spells a control token, or a part of one, into pieces") from None


def _weight(message: Message) -> tuple[bool | None, float]:
    return message.train, message.weight


def _check_prompt(row: _Row, i: int, answer: _Answer) -> None:
    """An answer after no generation prompt must begin with what it says, and not with its role's header."""
    text = row.text[answer.start : answer.stop].lstrip()
    if answer.start == row.ends[i] and not text.startswith(_REPLY.content):
        raise Refused("has no generation prompt, so that the header of an answer would be trained")


def _unwritten(row: _Row, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """The first part of a chat that is not in its rendering; empty if everything is."""

    def absent(text: str) -> bool:
        bare = text.strip()
        return bare not in row.text and _escaped(bare) not in row.text

    for k, (message, given) in enumerate(zip(messages, row.hidden.messages, strict=True)):
        if absent(given["content"]):
            return f"the content of message {k} ({message.role})"
        for call in given.get("tool_calls", ()):
            if any(map(absent, strings(call["function"]["arguments"]))):
                return f"the arguments of a tool call of message {k}"
    for given, tool in zip(row.hidden.tools, tools, strict=True):
        if absent(str(given.get("function", given).get("name", ""))):
            return f"the tool {str(tool.get('function', tool).get('name'))!r}"
    return ""


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
