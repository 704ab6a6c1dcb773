from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tuner.data.foreign import foreign_template, jinja, sandbox
from tuner.data.render import Renderer
from tuner.errors import DataError, ModelError
from tuner.types import Example, Message

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALL_TURNS = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE


def chat(question: str) -> Example:
    return Example((), ((Message("user", question), Message("assistant", "a")),), "chats.jsonl", 4)


HOSTILE = {
    "attribute walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute walk by filter": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "attribute walk by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n.__init__.__globals__ }}",
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless loop in C": "{% for a in range(99999) %}{{ (range(99999) | list | string) | wordcount }}{% endfor %}",
    "long string": "{{ 'a' * 200000000 }}",
    "long string, later": "{% set n = messages | length * 100000000 %}{{ 'a' * n }}",
    "long output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "huge power": "{{ 9 ** 99999999 }}",
    "huge range": "{{ range(1000000000) | list }}",
    "product": "{{ range(99999) | list * 99999 }}",
    "deep recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep nesting": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "wide format": "{{ '%0999999999d' % 1 }}",
    "wide centre": "{{ 'a' | center(999999999) }}",
    "lipsum": "{{ lipsum(n=9999) }}",
    "many tags": "{% if 1 %}" * 5000,
}


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The address space and resident memory (KiB) of each renderer that is started, as they grow."""
    found: list[int] = []
    running, start = threading.Event(), subprocess.Popen

    def watch(pid: int) -> None:
        while not running.is_set():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return
            if b"sandbox.py" in command:  # and not still the copy of this process
                found.extend(int(n) for n in re.findall(r"Vm(?:Peak|HWM):\s+(\d+)", status))
            time.sleep(0.003)

    def popen(*args: Any, **kwargs: Any) -> Any:
        process = start(*args, **kwargs)
        threads.append(threading.Thread(target=watch, args=(process.pid,)))
        threads[-1].start()
        return process

    threads: list[threading.Thread] = []
    monkeypatch.setattr(jinja.subprocess, "Popen", popen)
    yield found
    running.set()
    for thread in threads:
        thread.join()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_fails_soon_and_small(
    name: str, peaks: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    before, began = resident(), time.monotonic()
    with pytest.raises(
        ModelError, match=r"^the chat template of .* is none that tuner knows, and \S.*; set data.chat_template"
    ) as raised:
        foreign_template(HOSTILE[name] + ALL_TURNS, tokenizer)
    assert time.monotonic() - began < 2.0
    assert peaks and max(peaks) < 200 * 1024
    assert resident() - before < 100 * 2**20
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_the_memory_check_catches_a_renderer_without_its_limit(
    peaks: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    copy = tmp_path / "sandbox.py"
    copy.write_text(Path(sandbox.__file__).read_text().replace("MEMORY = 180 ", "MEMORY = 2000 "))
    monkeypatch.setattr(jinja.sandbox, "__file__", str(copy))
    with pytest.raises(ModelError):
        foreign_template(HOSTILE["long string"], tokenizer)
    assert max(peaks) > 200 * 1024


LOOPS = (
    "{% for m in messages %}{% if m.content == 'loop' %}"
    + HOSTILE["endless loop"]
    + "{% endif %}"
    + TURN
    + "{% endfor %}"
)


def test_a_row_that_ends_its_renderer_does_not_end_the_others(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, foreign_template(LOOPS + GENERATE, tokenizer))
    began = time.monotonic()
    with pytest.raises(
        DataError, match=r"chats.jsonl line 5: .* takes more than 1.2 seconds to render one chat; change the"
    ):
        renderer.render(chat("loop"))
    assert time.monotonic() - began < 2.0
    told: list[Example] = []
    rows = [chat(c) for c in ("fine", "loop", "fine")]
    found = renderer.render_batch(rows, on_bad=lambda e, _: told.append(e))
    assert [len(samples) for samples in found] == [1, 0, 1] and told == [rows[1]]


def test_a_row_that_is_too_large_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, foreign_template(ALL_TURNS, tokenizer))
    with pytest.raises(DataError, match="chats.jsonl line 5: .* a row of more than 4,000,000 characters"):
        renderer.render(chat("a" * 50_000_000))


def test_the_renderer_can_open_and_start_nothing() -> None:
    """Even code that got out of Jinja's sandbox has no file, socket or process to open."""
    code = (
        "import resource, socket, os, sys; sys.path.insert(0, sys.argv[1]); import sandbox\n"
        "for what, limit in sandbox.LIMITS.items(): resource.setrlimit(what, (limit, limit))\n"
        "for attempt in (lambda: open('/etc/passwd'), socket.socket, lambda: bytearray(200_000_000)):\n"
        "    try: attempt()\n"
        "    except (OSError, MemoryError) as error: print(type(error).__name__)\n"
    )
    folder = str(Path(sandbox.__file__).parent)
    done = subprocess.run([sys.executable, "-P", "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "OSError", "MemoryError"]


PARENT = """
import os, sys, time
from tuner.data.foreign.jinja import Process
process = Process(sys.argv[1], {})
process.start()
if sys.argv[2] == "forks" and os.fork() == 0:
    time.sleep(8)
    os._exit(0)
print(process._running.pid, flush=True)
if sys.argv[2] == "renders":
    loop = {"role": "user", "content": "loop"}
    process.ask({"messages": [loop], "tools": None, "twin": None, "add_generation_prompt": False, "seconds": 1.2})
if sys.argv[2] != "exits":
    time.sleep(30)
"""


@pytest.mark.parametrize("way", ["exits", "dies", "forks", "renders"])
def test_no_renderer_outlives_its_parent(way: str) -> None:
    """Also where another process still holds the pipe, and in the middle of a row."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, LOOPS + GENERATE, way],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if way == "exits":
        assert parent.wait(timeout=10) == 0
    else:
        time.sleep(0.1)
        parent.kill()
        parent.wait(timeout=10)
    deadline = time.monotonic() + 4
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    parent.stdout.close()
    with suppress(ProcessLookupError):  # the fork
        os.killpg(parent.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_renderer_ends_with_its_template() -> None:
    process = jinja.Process(ALL_TURNS, {})
    process.start()
    assert process._running is not None
    pid = process._running.pid
    assert alive(pid)
    del process
    assert not alive(pid)
