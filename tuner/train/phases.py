"""Where the seconds of a run go: setup, data, model, evaluation, training, saving.

A phase lasts until the next one begins, and each phase of a name adds to the same sum; so the sums add up to the whole
time of the run, and nothing is counted twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """A clock that always runs for exactly one phase."""

    _taken = False  # whether a run of this process has counted the start of the process

    def __init__(self) -> None:
        """Starts in `setup`, which for the first run of a process began with the process, imports included."""
        now = time.perf_counter()
        self._since = now if Phases._taken else now - _process_age()
        self._phase, self._seconds = "setup", dict[str, float]()
        Phases._taken = True

    def begin(self, phase: str) -> None:
        """Ends the phase that runs, and begins `phase`."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase`, and afterwards the one that ran before goes on."""
        before = self._phase
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, in the order in which they first ended."""
        self.begin(self._phase)
        return dict(self._seconds)


def _process_age() -> float:
    """Seconds since this process started; 0 where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stream:
            started = int(stream.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
