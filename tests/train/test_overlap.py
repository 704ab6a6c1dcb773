"""Work that is done ahead: in order, once, with its errors, and with a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tuner.errors import DataError
from tuner.train.overlap import Ahead, Arriving

CPU = torch.device("cpu")


class Noted:
    """Squares, which notes the calls and the threads of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[int] = []
        self.threads: list[threading.Thread] = []
        self.fails_at = fails_at
        self.made = threading.Semaphore(0)

    def __call__(self, number: int) -> int:
        self.calls.append(number)
        self.threads.append(threading.current_thread())
        self.made.release()
        if number == self.fails_at:
            raise DataError(f"row {number} cannot be read")
        return number**2

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.made.acquire(timeout=60)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tuner-ahead")]


def test_the_next_is_made_while_this_one_is_used() -> None:
    make = Noted()
    with Ahead(make, 4, CPU, background=True) as ahead:
        assert ahead(0) == 0
        make.wait(2)  # of which the second was not asked for yet
        assert make.calls == [0, 1]
        assert [ahead(i) for i in (1, 2, 3)] == [1, 4, 9]
        assert threads()
    assert make.calls == [0, 1, 2, 3], "each once, and none behind the last"
    main = threading.main_thread()
    assert [thread is main for thread in make.threads] == [True, False, False, False]
    assert not threads()


def test_without_a_thread_nothing_is_made_ahead() -> None:
    make = Noted()
    with Ahead(make, 4, CPU, background=False) as ahead:
        assert ahead(0) == 0 and make.calls == [0] and not threads()
    ahead = Ahead(make, 4, CPU, background=True)
    assert ahead(1) == 1 and make.calls == [0, 1], "nor outside of the context"


def test_another_number_than_the_next_is_made_on_the_spot() -> None:
    with Ahead(Noted(), 9, CPU, background=True) as ahead:
        assert [ahead(i) for i in (0, 5, 6, 2)] == [0, 25, 36, 4]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_is_raised_where_the_result_is_asked_for(background: bool) -> None:
    make = Noted(fails_at=2)
    with Ahead(make, 5, CPU, background=background) as ahead:
        assert (ahead(0), ahead(1)) == (0, 1)
        with pytest.raises(DataError, match="row 2 cannot be read"):
            ahead(2)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_what_it_works_for(error: type[BaseException]) -> None:
    make = Noted(fails_at=1)  # an error that nobody asks for is none
    with pytest.raises(error), Ahead(make, 5, CPU, background=True) as ahead:
        ahead(0)
        raise error
    assert not threads()


def test_values_arrive_as_they_were() -> None:
    values = torch.tensor([1.0, float("nan"), -0.0], dtype=torch.float64)
    assert Arriving(values).read().tolist()[::2] == [1.0, -0.0]


def test_mutant_a_thread_that_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def leave(self: Ahead[int], *_: object) -> None:
        kept.append(self._pool)

    end: Callable[..., None] = Ahead.__exit__
    monkeypatch.setattr(Ahead, "__exit__", leave)
    with pytest.raises(AssertionError):
        test_the_next_is_made_while_this_one_is_used()
    monkeypatch.setattr(Ahead, "__exit__", end)
    kept[0].shutdown()
