"""The recipes that ship, and the model and data they name -> files in the user's folder."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuner.errors import RecipeError
from tuner.recipe.schema import DataSource, Recipe
from tuner.registry import did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


def bundle_dir() -> Path | None:
    """The folder that holds the shipped `recipes/` and `data/`: inside the installed package, or the checkout."""
    for folder in (_PACKAGE / "_bundled", _PACKAGE.parent):
        if (folder / "recipes").is_dir():
            return folder
    return None


def shipped_recipes() -> Mapping[str, Path]:
    """Name -> file of every recipe that ships."""
    folder = bundle_dir()
    return {file.stem: file for file in sorted((folder / "recipes").glob("*.yaml"))} if folder else {}


def shipped_recipe(name: str) -> Path:
    """The file of the recipe called `name`; `recipes/chat.yaml` and `chat.yaml` name `chat` too."""
    known = shipped_recipes()
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    if stem not in known:
        raise RecipeError(f"no recipe '{name}' ships{did_you_mean(stem, known)}; known: {', '.join(known) or 'none'}")
    return known[stem]


def headline(file: Path) -> str:
    """The first line of a recipe's header comment."""
    with file.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def inputs(recipe: Recipe) -> list[str]:
    """Every path or Hub id that a recipe reads, as it is written there."""
    held_out: tuple[DataSource, ...] = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    paths = [recipe.model.name_or_path, *(source.path for source in (*recipe.data.train, *held_out))]
    adapter = recipe.adapter.path if recipe.adapter is not None else None
    paths += [path for path in (recipe.eval.questions, adapter) if path is not None]
    paths += [recipe.reference.model] if recipe.reference.model != "auto" else []
    return list(dict.fromkeys(paths))


def copy_out(file: Path, reads: Sequence[str], folder: Path) -> tuple[Path, list[Path]]:
    """Copies a shipped recipe to `folder/recipes/`, and what it reads of what ships (`reads`) beside it.

    Returns the recipe's path in `folder` and the files written; files that are there already with the same bytes are
    left alone. Raises RecipeError, before anything is written, if a file of another content is in the way.
    """
    root = file.parent.parent
    sources = [file]
    for path in (root / text for text in reads if text.startswith(("recipes/", "data/"))):
        sources += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    targets = {source: folder / source.relative_to(root) for source in sources if source.is_file()}
    for source, target in targets.items():
        if target.exists() and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise RecipeError(f"'{target}' exists with another content; move it away, or copy to another folder")
    written = []
    for source, target in targets.items():
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            written.append(target)
    return targets[file], written
