"""Numbers beyond which a recipe or an environment can only be wrong."""

from __future__ import annotations

MOST_THREADS = 1024  # of a process
MOST_TOKENS = 2**31 - 1  # in one row: positions in it are counted in 32 bits
