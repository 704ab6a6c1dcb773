"""A path or Hub id as written in a recipe -> an absolute path that exists, or the Hub id.

Relative to the current directory; if absent there, to the parent of the folder that holds the recipe; absent in both is
refused naming both. A Hub id is refused when a local folder has the name of its organisation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tuner.errors import RecipeError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIX = re.compile(r"\.(jsonl?|parquet|txt|csv|ya?ml|safetensors|bin|pt|gz|zst|arrow)$", re.IGNORECASE)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `org/name` and is not a file name."""
    return _HUB_ID.fullmatch(text) is not None and not _FILE_SUFFIX.search(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _resolved(path: Path) -> Path:
    """The path without links, but for the last: a file's own name says what it is, and that of its link may not (the
    Hub's cache links `train.jsonl` to a file that is called by its hash)."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def find_input(text: str, recipe_file: Path, where: str, *, hub: bool) -> str:
    """The absolute path that `text` means, or `text` itself where it is a Hub id and `hub` allows one.

    `where` opens the sentence of the RecipeError: place and key.
    """
    written = Path(os.path.expanduser(text))  # unlike Path.expanduser, this leaves a home that there is not as it is
    bases = [Path.cwd(), recipe_file.resolve().parent.parent]
    candidates = list(dict.fromkeys([written] if written.is_absolute() else [base / written for base in bases]))
    for candidate in candidates:
        if _exists(candidate):
            return str(_resolved(candidate))
    tried = " nor ".join(str(candidate) for candidate in candidates)
    if hub and is_hub_id(text):
        organisation = text.split("/")[0]
        local = [base / organisation for base in bases if (base / organisation).is_dir()]
        if not local:
            return text
        raise RecipeError(
            f"{where}: '{text}' could be a Hub id, but the folder {local[0]} exists and has no "
            f"'{text.split('/')[1]}'; mend the path, or run where there is no folder '{organisation}'"
        )
    neither = "neither " if len(candidates) > 1 else ""
    verb = "exists" if len(candidates) > 1 else "does not exist"
    forms = " (a Hub id has the form org/name)" if hub and "/" not in text and not _FILE_SUFFIX.search(text) else ""
    raise RecipeError(f"{where}: '{text}' is not there: {neither}{tried} {verb}{forms}")
