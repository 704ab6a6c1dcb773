"""A chat template and messages -> text, by a process that can do nothing else (`tuner.data.foreign.sandbox`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tuner.data.foreign import sandbox

SECONDS = 1.2  # for one row; for all that is asked of a template before the first


class Refused(Exception):
    """Why a template, or a row with it, cannot be used: the part of a sentence after "the chat template"."""


class Fatal(Refused):
    """A template that is no use for any chat."""


class Process:
    """The process that renders one template; started when first needed, and again after it was ended.

    It ends with this object, with this interpreter, or by itself a second after its parent is gone.
    """

    def __init__(self, jinja: str, variables: Mapping[str, Any]) -> None:
        self._first = {"jinja": jinja, "variables": dict(variables)}
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self, seconds: float = SECONDS) -> None:
        """Starts it and has it compile the template."""
        environment = {
            # its own interpreter and libraries, and nothing else that this process was told, such as keys
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
            "PYTHONUTF8": "1",
            "PYTHONHASHSEED": "0",
            "LC_ALL": "C",  # another locale may map hundreds of megabytes
        }
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        process = subprocess.Popen(
            [sys.executable, "-P", sandbox.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the parent, which may still need it
        )
        weakref.finalize(self, _end, process, os.getpid())
        self._running, self._owner = process, os.getpid()
        self._exchange(process, self._first | {"seconds": seconds})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Refused: the template cannot render this; `Fatal` where it can render nothing.
        """
        with self._lock:
            # a fork of this process must not talk into the same pipe
            if self._running is None or self._running.poll() is not None or self._owner != os.getpid():
                self.start()
            assert self._running is not None
            return self._exchange(self._running, request)

    def _exchange(self, process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line.endswith(b"\n"):
            _end(process, os.getpid())
            raise Fatal(_death(process.returncode))
        answer: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        if "error" in answer:
            _raise(answer["error"], answer["why"])
        return answer


def _raise(kind: str, why: str) -> None:
    if kind == "refused":
        raise Refused(f"refuses the chat: {why}")
    if kind == "memory":
        raise Fatal(_death(sandbox.OUT_OF_MEMORY))
    if kind == "changing":
        raise Fatal(f"asks for {why}, so that its text would not be the same another day")
    raise Refused(f"fails: {why}")


def _death(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"takes more than {SECONDS:g} seconds to render one chat"
    if status in (sandbox.OUT_OF_MEMORY, -signal.SIGKILL):
        most = f"{sandbox.MEMORY // 2**20} MiB, or writes more than {sandbox.MAX_TEXT:,} characters,"
        return f"takes more than {most} to render one chat"
    return f"ends its renderer (status {status})"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a process of ours and closes its pipes; a fork of its owner closes its copies of them only."""
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            assert pipe is not None
            pipe.close()
    if owner == os.getpid():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            return
        process.kill()
        process.wait()
