"""What a process takes from its environment."""

from __future__ import annotations

import pytest

from tuner.limits import MOST_THREADS
from tuner.train import setup


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        ("3", 3),
        ("4,2", 4),
        (str(MOST_THREADS), MOST_THREADS),
        *((odd, 6) for odd in ("", "0", "-3", "1.5", "abc", "²", str(MOST_THREADS + 1), "99999999999999999999")),
    ],
)
def test_the_threads_of_the_environment(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that a recipe could name counts; with any other value the cores of this process do."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(setup, "usable_cores", lambda: 6)
    assert setup.resolve_threads("auto", 1) == threads
