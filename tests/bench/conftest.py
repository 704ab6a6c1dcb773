"""The benchmarks are scripts beside one another, not a package: their folder goes on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A toy step has nothing to share between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


sys.path.insert(0, str(BENCH))
