"""What the host does while the device works: the data of the next step, and the results of the one before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make` of one number after another; as a context manager it makes the next one in a thread of its own.

    What `make` raises there is raised where its result is asked for. It must not draw random numbers.

    Args:
        stop: the number before which it ends.
        background: whether there is such a thread. A CPU has no time to spare while it computes.
    """

    def __init__(self, make: Callable[[int], T], stop: int, device: torch.device, *, background: bool) -> None:
        self._make, self._stop, self._device, self._background = make, stop, device, background
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Ahead[T]:
        if self._background:
            self._pool = ThreadPoolExecutor(1, "tuner-ahead", initializer=self._enter_thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._next = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __call__(self, number: int) -> T:
        known, self._next = self._next, None
        found = known[1].result() if known is not None and known[0] == number else self._make(number)
        if self._pool is not None and number + 1 < self._stop:
            self._next = (number + 1, self._pool.submit(self._make, number + 1))
        return found

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins on the first one


class Arriving:
    """Values of the device on their way to the host. Only who reads them waits, and for no work that came later."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """The values, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
