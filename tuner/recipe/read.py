"""A recipe or pipeline file and the overrides of a command line -> one tree of values that know where they stand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from tuner.errors import RecipeError
from tuner.recipe import yaml12
from tuner.recipe.rules import show
from tuner.recipe.schema import SECTIONS, Recipe
from tuner.recipe.shipped import shipped_recipes
from tuner.recipe.yaml12 import Node
from tuner.registry import did_you_mean

MAX_BYTES = 64 * 1024
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|://[^\s/:@]+:[^\s/@]+@"
)


def read(file: Path) -> Node:
    """The file's mapping; every RecipeError names the file."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        known = shipped_recipes()
        if file.stem in known and file.suffix in ("", ".yaml", ".yml"):
            remedy = f"; a recipe of this name ships with tuner: write it here with `tuner recipes copy {file.stem}`"
        else:
            remedy = did_you_mean(file.stem, known) + "; `tuner recipes list` names those that ship"
        raise RecipeError(f"there is no recipe at '{file}'{remedy}") from None
    except IsADirectoryError:
        raise RecipeError(f"'{file}' is a folder; give the recipe file in it") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe '{file}': {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"'{file}' is larger than {MAX_BYTES // 1024} KiB, which no recipe needs; is it data?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text; save the recipe as UTF-8") from None
    for number, line_text in enumerate(text.splitlines(), 1):
        _refuse_secret(line_text, f"{file}:{number}")
    root = yaml12.parse(text, str(file))
    if root is None or root.value is None:
        raise RecipeError(f"'{file}' is empty; start from one that ships: `tuner recipes list`")
    if not isinstance(root.value, dict):
        raise RecipeError(
            f"{root.place}: a recipe is a mapping of sections (model:, data:, train:), not {show(root.plain())}"
        )
    return dataclasses.replace(root, place=str(file))


def _refuse_secret(text: str, place: str) -> None:
    if _SECRET.search(text):
        raise RecipeError(f"{place}: this looks like a credential; remove it, and log in with `hf auth login` instead")


def with_overrides(root: Node, overrides: Sequence[str], prefix: str = "") -> Node:
    """A copy of `root` with `section.key=value` on top; `prefix` stood before each text on the command line."""
    seen: set[str] = set()
    for i, text in enumerate(overrides):
        _refuse_secret(text, "override")
        key, equals, value = text.partition("=")
        key = key.strip()
        place = f"override '{prefix}{show(text)[1:-1]}'"
        if not equals or not key or not all(key.split(".")):
            raise RecipeError(f"{place}: an override has the form section.key=value")
        if key in seen:
            raise RecipeError(f"{place}: {prefix}{key} is given twice; keep one")
        seen.add(key)
        line = 2**20 + i  # after every line of the file
        node = yaml12.parse(value, place, numbered=False) or Node(None, place, line)
        root = put(root, key.split("."), dataclasses.replace(node, line=line), place)
    return root


def put(node: Node, path: Sequence[str], new: Node, place: str, done: str = "") -> Node:
    """A copy of `node` with `new` at `path`; a null takes a known key out, back to its default."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{place}: {done} is {show(node.plain())} in the recipe, not a section; give {done} whole")
    name, rest = path[0], path[1:]
    children = dict(node.value)
    where = f"{done}.{name}" if done else name
    if rest:
        child = children.get(name)
        if child is None or child.value is None:
            child = Node({}, place, new.line)
        children[name] = put(child, rest, new, place, where)
    elif new.value is None and is_known(where):
        children.pop(name, None)
    else:
        children[name] = new
    return dataclasses.replace(node, value=children)


def is_known(key: str) -> bool:
    section, _, name = key.partition(".")
    return name in SECTIONS[section].model_fields if section in SECTIONS and name else key in Recipe.model_fields
