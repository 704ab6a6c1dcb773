"""The import floors: a file of tuner/ imports only from the floors below it, and each heavy library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "tuner"

# From the ground up; on one floor, a module may import those to its left.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("limits", "types", "errors", "registry"),
    ("recipe", "losses", "kernels"),
    ("data", "model"),
    ("checkpoint", "generate", "evaluate"),
    ("train",),
    ("environment", "stages"),
    ("export",),
    ("pipeline",),
    ("cli",),
    ("__main__",),
)
RANK = {name: i for i, name in enumerate(name for floor in FLOORS for name in floor)}

# Library -> the files and folders of tuner/ that may import it; nowhere else.
HOMES = {
    "triton": ("kernels/",),
    "datasets": ("data/source.py",),
    "bitsandbytes": ("model/",),
    "peft": ("model/",),
    "trl": (),
}
# These answer before torch could be loaded, so nothing heavy may be imported with them, however indirectly.
LIGHT = ("cli", "recipe", "registry", "errors", "limits")
# What may be imported only when it is needed: seconds that local files should not pay.
DEFERRED = {("data/source.py", "datasets")}
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "numpy", "trl", "triton"}


@dataclass(frozen=True)
class Import:
    """One import: `target` is the dotted name in full, `deferred` if it does not run with the module."""

    file: str  # relative to the package, as data/source.py
    line: int
    target: str
    in_function: bool
    typing_only: bool


def package_imports(root: Path) -> list[Import]:
    """Every import of every file below `root`, relative ones resolved."""
    found: list[Import] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        module = ("tuner", *name.with_suffix("").parts)
        package = module[:-1]  # what `from . import` starts at, in a module and in an __init__ alike
        for node, in_function, typing_only in _walk(ast.parse(path.read_text(encoding="utf-8")), False, False):
            for target in _targets(node, package, root):
                found.append(Import(name.as_posix(), node.lineno, target, in_function, typing_only))
    return found


def _walk(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield child, inside, typing
        yield from _walk(child, inside, typing)


def _targets(node: ast.AST, package: tuple[str, ...], root: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - (node.level - 1)] if node.level else ()
        parts = (*base, *(node.module.split(".") if node.module else ()))
        folder = root.joinpath(*parts[1:])
        # `from tuner import cli` and `from . import pack` import modules, `from tuner.errors import X` a name of one
        return [
            ".".join((*parts, alias.name))
            if (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").is_file()
            else ".".join(parts)
            for alias in node.names
        ]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module",
        "import_module",
        "__import__",
    ):
        return [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def violations(root: Path) -> list[str]:
    """What breaks the rules, as `file:line: sentence`."""
    imports = package_imports(root)
    bad = []
    for entry in imports:
        where = f"{entry.file}:{entry.line}"
        here = entry.file.split("/")[0].removesuffix(".py")
        parts = entry.target.split(".")
        if here not in RANK and here != "__init__":
            bad.append(f"{where}: {here} has no floor; give it one")
        elif parts[0] == "tuner" and len(parts) > 1:
            if here == "__init__":
                bad.append(
                    f"{where}: the package itself imports {entry.target}, which would run on every import of tuner"
                )
            elif parts[1] not in RANK:
                bad.append(f"{where}: {entry.target} has no floor; give it one")
            elif parts[1] != here and RANK[parts[1]] > RANK[here]:
                bad.append(f"{where}: {here} imports {entry.target}, which stands above it")
        homes = HOMES.get(parts[0])
        if homes is not None and not any(entry.file.startswith(home) for home in homes):
            bad.append(f"{where}: {parts[0]} may only be imported in {', '.join(homes) or 'tests'}")
        deferred = entry.file == "cli.py" or (entry.file, parts[0]) in DEFERRED
        if entry.in_function and parts[0] in {"tuner", *HEAVY} - {"triton"} and not deferred:
            bad.append(f"{where}: imports {entry.target} inside a function; move it to the top of the file")
    return bad + list(_heavy(imports, root))


def _heavy(imports: list[Import], root: Path) -> Iterator[str]:
    """Chains of imports that run from a light module to a heavy library."""
    run = [entry for entry in imports if not entry.in_function and not entry.typing_only]
    by_file: dict[str, list[Import]] = {}
    for entry in run:
        by_file.setdefault(entry.file, []).append(entry)
    light = [f for f in sorted({e.file for e in imports}) if f.split("/")[0].removesuffix(".py") in LIGHT]
    for start in light:
        queue, seen = [(start, start)], {start}
        while queue:
            file, chain = queue.pop()
            for entry in by_file.get(file, ()):
                parts = entry.target.split(".")
                if parts[0] in HEAVY:
                    yield f"{file}:{entry.line}: {chain} imports {parts[0]} with the module"
                for loaded in _files_run(parts, root) if parts[0] == "tuner" else ():
                    if loaded not in seen:
                        seen.add(loaded)
                        queue.append((loaded, f"{chain} -> {loaded}"))


def _files_run(parts: list[str], root: Path) -> list[str]:
    """The files of the package that importing `parts` runs: every package on the way, and the module."""
    files = []
    for depth in range(1, len(parts)):
        stem = "/".join(parts[1 : depth + 1])
        files += [name for name in (f"{stem}.py", f"{stem}/__init__.py") if (root / name).is_file()]
    return files


def test_every_file_imports_only_from_below() -> None:
    assert violations(ROOT) == []


PLANTED = {
    "upward": ("data/bad.py", "from tuner.stages import sft\n", "stands above it"),
    "upward as a module": ("data/bad.py", "import tuner.cli as c\n", "stands above it"),
    "upward by name": ("data/bad.py", "from tuner import cli\n", "stands above it"),
    "upward, relative": ("data/bad.py", "from ..stages import sft\n", "stands above it"),
    "upward, relative name": ("data/bad.py", "from .. import stages\n", "stands above it"),
    "upward from an __init__": ("data/__init__.py", "from ..cli import app\n", "stands above it"),
    "upward for types": ("data/bad.py", "if TYPE_CHECKING:\n    from tuner import cli\n", "stands above it"),
    "right on one floor": ("data/bad.py", "from tuner.model import load\n", "stands above it"),
    "upward by string": ("data/bad.py", "import importlib\nimportlib.import_module('tuner.cli')\n", "stands above it"),
    "hidden in a function": ("train/bad.py", "def f():\n    import torch\n", "inside a function"),
    "the package itself": ("__init__.py", "from tuner import recipe\n", "every import of tuner"),
    "no floor": ("attic.py", "import json\n", "has no floor"),
    "import of no floor": ("cli.py", "from tuner import attic\n", "has no floor"),
    "triton outside": ("model/bad.py", "import triton.language as tl\n", "may only be imported in kernels/"),
    "datasets outside": (
        "data/bad.py",
        "from datasets import load_dataset\n",
        "may only be imported in data/source.py",
    ),
    "peft outside": ("train/bad.py", "from peft import PeftModel\n", "may only be imported in model/"),
    "trl anywhere": ("stages/bad.py", "import trl\n", "may only be imported in tests"),
    "torch in the recipe": ("recipe/bad.py", "import torch\n", "imports torch with the module"),
    "torch in cli": ("cli.py", "import torch\n", "imports torch with the module"),
    "torch behind cli": ("cli.py", "from tuner.types import Batch\n", "types.py imports torch with the module"),
    "torch behind a package": ("recipe/bad.py", "from tuner.types import Batch\n", "types.py imports torch"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_seen(name: str, tmp_path: Path) -> None:
    file, text, expected = PLANTED[name]
    package = tmp_path / "tuner"
    for folder in ("data", "model", "train", "stages", "recipe", "kernels"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "cli.py").touch()
    (package / "stages" / "sft.py").touch()
    (package / "model" / "load.py").touch()
    (package / "types.py").write_text("import torch\n")
    (package / "errors.py").touch()
    if name == "import of no floor":
        (package / "attic.py").touch()
    assert violations(package) == [] or name == "import of no floor"
    path = package / file
    path.write_text(path.read_text() + text if path.exists() else text)
    found = violations(package)
    assert any(expected in sentence for sentence in found), found


def test_imports_below_are_allowed(tmp_path: Path) -> None:
    package = tmp_path / "tuner"
    for file, text in {
        "types.py": "import torch\n",
        "data/__init__.py": "",
        "data/source.py": "import datasets\nfrom ..types import Batch\nfrom . import pack\n",
        "data/pack.py": "import numpy\n",
        "kernels/norm.py": "import triton\n",
        "cli.py": "def f():\n    from tuner.data import source\n    import torch\n",
        "recipe/__init__.py": "if TYPE_CHECKING:\n    import torch\n",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    assert violations(package) == []
