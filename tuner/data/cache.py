"""A source and all that decides its tokens -> a folder with those tokens, used again while nothing has changed.

An entry is named by the sha256 of the bytes of the file (or the commit of a Hub data set), the settings of the data
section and of the source, the template, the tokenizer, and the code that renders. It holds the arrays of a store and
what happened to the rows. It is written to a folder of its own and published by one rename, so that a reader finds
either all of it or nothing, and of two writers the first one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from tuner.data.report import DataReport
from tuner.data.store import Block, Damaged, StoreBuilder, load
from tuner.data.templates import Template
from tuner.errors import TunerError, first_line
from tuner.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tuner.recipe import DataSection, DataSource

MAX_BYTES = 20 * 10**9  # of all entries together; the ones unused for longest go first
REPORT = "report.json"
UNFINISHED = "tmp-"  # how the name of a folder begins that is no entry
STALE = 24 * 3600  # seconds after which an unfinished folder is taken for abandoned

# Keys of the data section that do not decide the tokens of a source: `train` and `eval` name the sources, whose own
# keys count; the others choose the template, which counts itself; or they matter only after the tokens are made.
NOT_IN_KEY = frozenset(
    {"train", "eval", "packing", "cache", "chat_template", "date_string", "template_options", "control_tokens"}
)
# Keys of a source that do not: its bytes or its commit stand for the path and the revision; `weight` picks afterwards.
NOT_IN_SOURCE_KEY = frozenset({"path", "revision", "weight", "streaming"})


def _version() -> str:
    """sha256 of the code between a row and its tokens, so that no change of it needs a number to be raised."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.jinja"), package.parent / "types.py"]):
        digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


RENDERER_VERSION = _version()


class Unwritable(Exception):
    """The cache cannot hold the entry; says why."""


@dataclass(frozen=True, eq=False)
class Part:
    """The samples of one source before its weight picks among them, and what happened to its rows."""

    block: Block
    report: DataReport
    format: str
    num_chats: int


def directory() -> Path:
    """Where entries lie: the folder that TUNER_CACHE names, or ~/.cache/tuner; in it, `tokens`."""
    # unlike Path.expanduser, this leaves a home that there is not as it is
    return Path(os.path.expanduser(os.environ.get("TUNER_CACHE") or "~/.cache/tuner")) / "tokens"


def identity(data: DataSection, tokenizer: PreTrainedTokenizerFast, template: Template | None) -> dict[str, Any]:
    """What decides the tokens of every source of a recipe: settings, template, tokenizer, and the code itself."""
    return {
        "renderer": RENDERER_VERSION,
        "tokenizers": tokenizers.__version__,
        "settings": data.model_dump(mode="json", exclude=set(NOT_IN_KEY)),
        "template": None if template is None else _template(template),
        "tokenizer": _tokenizer(tokenizer),
    }


def entry_key(common: dict[str, Any], source: DataSource, content: str, kind: str) -> str:
    """The name of an entry: sha256 of `identity`, the source's own settings, its content and its kind of file."""
    own = source.model_dump(mode="json", exclude=set(NOT_IN_SOURCE_KEY))
    text = json.dumps([common, own, content, kind], sort_keys=True, default=dict)  # a template's mappings
    return hashlib.sha256(text.encode()).hexdigest()


def _template(template: Template) -> dict[str, Any]:
    """Its name, options and saved text, and the pieces of a small conversation: a template is code as well as text."""
    chat = [Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")]
    shown = []
    for messages in (chat[1:3], chat):
        try:
            shown.append([list(piece) for piece in template.pieces(messages, add_generation_prompt=True)])
        except TunerError as error:  # a template need not have a place for each role
            shown.append([[str(error)]])
    plain: dict[str, Any] = {"shown": shown, "saved": template.saved()}
    for name, value in ((f.name, getattr(template, f.name)) for f in fields(template)):
        if not callable(value):
            plain[name] = sorted(value) if isinstance(value, frozenset) else value
    return plain


def _tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The backend without truncation and padding, which rendering never uses, and the control tokens of the wrapper."""
    backend = tokenizer.backend_tokenizer.to_str()
    # its fields have a fixed order: version, truncation, padding, added_tokens, ...
    _, found, rest = backend.partition('"added_tokens":')
    added = [[i, repr(token)] for i, token in sorted(tokenizer.added_tokens_decoder.items())]
    return {
        "backend": hashlib.sha256((rest if found else backend).encode()).hexdigest(),
        "added": added,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
    }


def find(key: str, path: str) -> Part | None:
    """The entry, if there is one and its sha256 are right; `path` is what the source is called now."""
    entry = directory() / key
    try:
        block = load(entry, verify=True)
        stored = json.loads((entry / REPORT).read_bytes())
        if _digest(stored["report"]) != stored["sha256"]:
            raise Damaged(f"{entry / REPORT} has another sha256 than it says")
        values = stored["report"]
        report = DataReport.from_dict(_renamed(values["report"], values["path"], path))
        block = replace(block, sources=tuple(path for _ in block.sources))
        part = Part(block, report, values["format"], values["num_chats"])
    except (Damaged, OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # used last, so dropped last
    return part


def keep(key: str, path: str, make: Callable[[StoreBuilder], tuple[DataReport, str, int]]) -> Part:
    """Makes the entry: `make` fills a builder and gives the report, the format and the number of chats.

    Whatever `make` raises goes on, and leaves no entry.

    Raises:
        Unwritable: the folder of the cache cannot be written, or the disk is full.
    """
    root = directory()
    with _unwritable(root):
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
    try:
        with _Guarded(unfinished) as builder:
            report, format_name, num_chats = make(builder)
            block = builder.finish()
        values = {"path": path, "report": report.as_dict(), "format": format_name, "num_chats": num_chats}
        with _unwritable(root):
            text = json.dumps({"report": values, "sha256": _digest(values)})
            (unfinished / REPORT).write_text(text, encoding="utf-8")
            _publish(unfinished, root / key)
        _shrink(root, keep=key)
        return Part(block, report, format_name, num_chats)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Guarded(StoreBuilder):
    """A builder whose failure to write is told from a failure to read the source."""

    def __init__(self, folder: Path) -> None:
        with _unwritable(folder.parent):
            super().__init__(folder)

    def add(self, samples: Any) -> None:
        with _unwritable(self._root):
            super().add(samples)

    def finish(self) -> Block:
        with _unwritable(self._root):
            try:
                return super().finish()
            except Damaged as error:  # as where the disk filled up unnoticed
                raise Unwritable(str(error)) from None

    @property
    def _root(self) -> Path:
        assert self.directory is not None
        return self.directory.parent


@contextlib.contextmanager
def _unwritable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{root}: {error.strerror or first_line(error)}") from None


def _publish(unfinished: Path, entry: Path) -> None:
    """Renames the folder to the entry. One that is there already is damaged, or another process was quicker."""
    try:
        unfinished.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
        if find(entry.name, "") is None:
            _discard(entry)
            with contextlib.suppress(OSError):  # another process mended it meanwhile
                unfinished.rename(entry)


def _discard(entry: Path) -> None:
    """Removes a folder of the cache; its name is free at once, and who has its files mapped keeps them."""
    aside = entry.with_name(f"{UNFINISHED}{entry.name}-{os.getpid()}-{time.monotonic_ns()}")
    with contextlib.suppress(OSError):
        entry.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _shrink(root: Path, keep: str) -> None:
    """Drops what was abandoned unfinished, then the entries unused for longest until the rest fits."""
    entries = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            used, size = folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
            if not folder.name.startswith(UNFINISHED):
                entries.append((folder.name != keep, -used, size, folder))
            elif time.time() - used > STALE:
                _discard(folder)
    total = 0
    for _, _, size, folder in sorted(entries, key=lambda entry: entry[:2]):
        total += size
        if total > MAX_BYTES and folder.name != keep:
            _discard(folder)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _renamed(report: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A report whose places begin with `new` instead of `old`: the same bytes may lie elsewhere by now."""

    def moved(text: str) -> str:
        return new + text.removeprefix(old) if text.startswith(old) else text

    counts = {k: c | {"rows": [moved(row) for row in c["rows"]]} for k, c in report["counts"].items()}
    return report | {"sources": [moved(line) for line in report["sources"]], "counts": counts}
