"""A chat template and messages -> text, in a process that can do nothing else; run as a script, it imports no tuner.

A checkpoint's template is a program by a stranger. Jinja's sandbox keeps it from Python's internals, and the system
keeps the process small: `MEMORY` bytes of address space, an alarm for each request that ends it wherever it is (also in
C code), no file or socket to open, no process to start. It reads one JSON line and writes one, until its input ends or
its parent is gone. The first line is `{jinja, variables, seconds}`, each further one `{messages, tools, twin,
add_generation_prompt, seconds}`; the answer is `{error, why}`, or for a chat what `chat_parts` gives.

The environment is that of `transformers.PreTrainedTokenizerBase.apply_chat_template`, except that what differs from one
rendering to the next (the clock, chance) is refused.
"""

from __future__ import annotations

# Jinja and Python import these when they first need them, and then no file can be opened any more.
import encodings.ascii
import encodings.unicode_escape
import html
import json
import os
import pprint
import resource
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2.constants
import jinja2.debug
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_LOADED = (encodings.ascii, encodings.unicode_escape, html, pprint, textwrap, jinja2.constants, jinja2.debug)
MEMORY = 180 * 2**20  # bytes of address space, of which Python and Jinja take about 25 MB
MAX_TEXT = 4_000_000  # characters of one rendering: a row of a million tokens
OUT_OF_MEMORY = 12  # the exit status where not even an answer could be written
LIMITS = {
    resource.RLIMIT_AS: MEMORY,
    resource.RLIMIT_NOFILE: 3,  # stdin, stdout and stderr are open, so nothing else can be
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}


class Refused(TemplateError):
    """The template itself says that it cannot render this chat."""


class Changing(TemplateError):
    """The template asks for what is different each time."""


class Generation(Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, with which transformers marks answers, and renders the body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block call, as it is there, so that what is set inside stays inside
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainNamespace(Namespace):
    """Jinja's `namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise TemplateError(f"a namespace cannot hold {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a step towards Python's internals is an error, not something that prints nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__!r} is unsafe")


def environment() -> Sandbox:
    """The environment that chat templates are written for."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
    env.filters["tojson"] = _tojson
    env.filters["random"] = _changing("the random filter")
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _changing("strftime_now, today's date"),
        "lipsum": _changing("lipsum, random text"),
        "namespace": PlainNamespace,
    }
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise Refused(message)


def _changing(what: str) -> Callable[..., str]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise Changing(what)

    return refuse


class Renderer:
    """One compiled template with its variables."""

    def __init__(self, jinja: str, variables: Mapping[str, Any]) -> None:
        self._template: Template = environment().from_string(jinja)
        self._variables = dict(variables)

    def chat_parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        twin: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> dict[str, Any]:
        """The text of a chat, of its twin, and how its beginnings render.

        `ends[k]` is the length of `messages[:k]` alone, and `prompts[k]` that with a generation prompt (for an answer
        at `k`); None where it does not render, or is no prefix of `text` or of `messages[:k + 1]` alone.
        """
        text = self._text(messages, tools, add_generation_prompt)
        count = len(messages)
        ends: list[int | None] = [0, *[None] * count]
        prompts: list[int | None] = [None] * count
        for k, message in enumerate(messages):
            prompt = self._try(messages[:k], tools, True) if message["role"] == "assistant" else None
            whole = text if k + 1 == count and not add_generation_prompt else self._try(messages[: k + 1], tools, False)
            if whole is not None and text.startswith(whole):
                ends[k + 1] = len(whole)
            if prompt is not None and whole is not None and whole.startswith(prompt):
                prompts[k] = len(prompt)
        twin_text = None if twin is None else self._text(twin, tools, add_generation_prompt)
        return {"text": text, "twin": twin_text, "ends": ends, "prompts": prompts}

    def _try(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, prompt: bool) -> str | None:
        """A beginning of a chat need not render: a template may want a user turn, or turns in order."""
        try:
            return self._text(messages, tools, prompt)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, Changing):
                raise
            return None

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, prompt: bool) -> str:
        text = self._template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._variables
        )
        if len(text) > MAX_TEXT:
            raise MemoryError
        return text


def _answer(line: bytes, renderer: Renderer | None) -> tuple[Renderer, dict[str, Any]]:
    request = json.loads(line)
    # the default action, not a handler of Python's, which would wait for C code to end
    signal.setitimer(signal.ITIMER_REAL, request.pop("seconds"))
    if renderer is None:
        return Renderer(**request), {}
    return renderer, renderer.chat_parts(**request)


def _said(error: Exception) -> dict[str, str]:
    """An exception as an answer: its kind, and its first words."""
    kind = {Refused: "refused", Changing: "changing", MemoryError: "memory", RecursionError: "deep"}.get(type(error))
    return {"error": kind or "failed", "why": " ".join(str(error).split())[:200] or type(error).__name__}


def _line(parent: int) -> bytes:
    """The next request; nothing once there will be none."""
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        # its end of the pipe may live on in another child of it
        if os.getppid() != parent:
            return b""
    return sys.stdin.buffer.readline()


def main() -> None:
    """Answers until there is nobody to answer."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent, renderer = os.getppid(), None
    Renderer("{% for m in messages %}{{ 'x' | pprint }}{% endfor %}", {}).chat_parts(
        [{"role": "user"}], None, None, False
    )
    for what, limit in LIMITS.items():
        most = resource.getrlimit(what)[1]
        least = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(what, (least, least))
    while (line := _line(parent)).endswith(b"\n"):
        try:
            renderer, answer = _answer(line, renderer)
        except Exception as error:  # whatever a stranger's program does is its answer
            answer = _said(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        out = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        sys.stdout.buffer.write(out + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
