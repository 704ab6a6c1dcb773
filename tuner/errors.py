"""What can go wrong, as one tree; the command line turns each into one sentence and an exit code.

TunerError
├── UserError            exit 2   the recipe, the data or the usage is wrong; nothing has been changed
│   ├── RecipeError               a key, a value or a file of the recipe
│   ├── DataError                 a row, a file or a split of the data
│   ├── ModelError                a checkpoint, an adapter or a tokenizer
│   └── RunDirError               an output directory, a resume or an overwrite
├── RunError             exit 1   the run failed after it began
│   ├── NonFiniteError            a loss or gradient is NaN or infinite; the weights are as they were
│   ├── OutOfMemoryError          names the key to lower
│   └── SaveError                 the disk refused; the last checkpoint is intact
└── Interrupted          exit 128 + signal, after a checkpoint of the last finished step
"""

from __future__ import annotations

import unicodedata


def first_line(error: BaseException) -> str:
    """What another library said, as part of a sentence: its first line, and the next if that ends in a colon."""
    if isinstance(error, KeyError):
        return f"{error} is unknown"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def printable(text: str) -> str:
    """`text` on one line, with the code of each character that is none for a terminal in its place, as `⟨U+001B⟩`.

    Names of files and columns, and what a stranger's chat template says, may hold commands to a terminal.
    """
    if text.isprintable():
        return text
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _COMMANDS else c for c in text)


# control, format, half of a surrogate pair, line and paragraph separator
_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class TunerError(Exception):
    """Base of all that tuner raises on purpose. `str(error)` is one clear sentence with the remedy."""

    exit_code = 1


class UserError(TunerError):
    """A mistake that the user can mend: exit 2."""

    exit_code = 2


class RecipeError(UserError):
    """A key, a value or the file of a recipe."""


class DataError(UserError):
    """A row, a file or a split of the data. `kind` sorts what is wrong with a row, for `tuner data check`."""

    def __init__(self, message: str, kind: str = "unusable") -> None:
        super().__init__(message)
        self.kind = kind


class ModelError(UserError):
    """A checkpoint, an adapter or a tokenizer."""


class RunDirError(UserError):
    """An output directory, a resume or an overwrite."""


class RunError(TunerError):
    """The run failed after it began: exit 1."""


class NonFiniteError(RunError):
    """A loss or a gradient is NaN or infinite; raised before the update, so the weights are as they were."""


class OutOfMemoryError(RunError):
    """The device ran out of memory."""


class SaveError(RunError):
    """A checkpoint or result could not be written; what was published before is intact."""


class Interrupted(TunerError):
    """Stopped by a signal after the last finished step was published; `remedy` says how to go on."""

    def __init__(self, signum: int, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.remedy}" if self.remedy else str(self.args[0])
