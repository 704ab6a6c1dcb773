"""A path or Hub id of the recipe -> rows. The only file that touches `datasets` (Hub ids) and pyarrow (parquet, zstd).

JSON and JSON Lines are read with `json` itself: Arrow would unify the rows to one schema and add keys that a row does
not have. Every kind but parquet may be compressed, and all but JSON are read row by row, however large they are.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuner.data.formats import ArrowRow, shorten
from tuner.data.report import COMPRESSED, place
from tuner.errors import DataError, first_line
from tuner.registry import did_you_mean

if TYPE_CHECKING:
    from tuner.recipe import DataSource

Row = dict[str, Any]
OnBad = Callable[[int, DataError], None]


def rows(source: DataSource, on_bad: OnBad | None = None) -> Iterator[tuple[int, Row]]:
    """The rows of a source with their numbers, counted from 0 (in JSON Lines: line numbers).

    `on_bad` is told of a row that cannot be read, and reading goes on; without it the first such row is an error.

    Raises:
        DataError: the source is missing, unreadable or empty; names the file, the line and the remedy.
    """

    first: DataError | None = None
    unreadable = 0

    def bad(index: int, reason: str) -> None:
        nonlocal first, unreadable
        error = DataError(f"{place(source.path, index)}: {reason}", kind="unreadable")
        if on_bad is None:
            raise error
        first, unreadable = first or error, unreadable + 1
        on_bad(index, error)

    path = local_path(source)
    found = False
    for index, value in _hub_rows(source) if path is None else _READERS[_suffix(path)](path, bad):
        found = True
        if isinstance(value, dict):
            yield index, value
        else:
            bad(index, _no_object(value, alone=index == 0 and path is not None and ".jsonl" in _suffix(path)))
    if not found and first is None:
        raise DataError(f"{source.path} holds no rows; give a file with data")
    if not found:
        raise DataError(f"none of the {unreadable:,} rows of {source.path} can be read; the first: {first}")


def content_hash(source: DataSource) -> str:
    """What identifies the data: sha256 of the file's bytes, or the commit of a Hub data set."""
    path = local_path(source)
    if path is None:
        return _hub_commit(source.path, source.revision)
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def stamp(source: DataSource) -> tuple[int, int, int] | None:
    """What changes when somebody writes to the file of a source: inode, size, time; None for a Hub id."""
    path = local_path(source)
    if path is None:
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def kind_of_file(source: DataSource) -> str:
    """How the bytes of a source are read: the end of its file's name, or `hub`."""
    path = local_path(source)
    return "hub" if path is None else _suffix(path)


def local_path(source: DataSource) -> Path | None:
    """The file that a source names, or None for a Hub id.

    Raises:
        DataError: there is no such file, it is a directory, a pipe, a device or of an unknown kind, or a file is given
            a split.
    """
    path = Path(os.path.expanduser(source.path))
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if _suffix(p) in _READERS)[:5]
        raise DataError(
            f"{source.path} is a directory; name a file in it" + (f": {', '.join(inside)}" if inside else "")
        )
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.path) and _suffix(path) not in _READERS:
            if Path(source.path.split("/")[0]).exists():
                raise DataError(
                    f"{source.path} does not exist, and as a folder of that name does it is no Hub id either"
                )
            return None
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{source.path} does not exist{near}; give a data file or a Hub id (org/name)")
    if _suffix(path) not in _READERS:
        raise DataError(
            f"{source.path}: files of this kind cannot be read; known: {', '.join(_TEXT)}, each also compressed "
            f"({', '.join(COMPRESSED)}), and .parquet"
        )
    if not path.is_file():  # whoever opens a pipe may wait for ever, and rows are read more than once
        raise DataError(f"{source.path} is a pipe or a device, and rows are read more than once; write them to a file")
    for key, value, default in (("split", source.split, "train"), ("revision", source.revision, None)):
        if value != default:
            raise DataError(
                f"{source.path} is a file, which has no {key} '{value}'; remove `{key}`, or name another file"
            )
    if source.streaming:
        raise DataError(
            f"{source.path} is a file, and `streaming` is for Hub ids; remove it: files are always streamed"
        )
    return path


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((s for s in sorted(_READERS, key=len, reverse=True) if name.endswith(s)), path.suffix)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


_Bad = Callable[[int, str], None]


# What reading a damaged or unreadable file raises, compressed or not.
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_DECOMPRESS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, without its compression."""
    with _open(path) as raw:
        end = next((end for end in COMPRESSED if _suffix(path).endswith(end)), "")
        if end == ".zst":
            # imported here: Python 3.11 has no zstd of its own, and hardly any file needs it
            arrow = importlib.import_module("pyarrow")
            if not arrow.Codec.is_available("zstd"):
                raise DataError(f"{path}: this pyarrow cannot read zstd; compress the file with gzip instead")
            with io.BufferedReader(arrow.CompressedInputStream(raw, "zstd")) as file:
                yield file
        elif end:
            with _DECOMPRESS[end](raw) as file:
                yield file
        else:
            yield raw


def _broken(path: Path, index: int, error: BaseException, read: int) -> DataError:
    """The error for a file that cannot be read to its end, after `read` rows."""
    remedy = f"restore the file, or read the {read:,} rows before (limit: {read})"
    remedy = remedy if read else "restore the file, or give it the ending of what it is"
    return DataError(f"{place(str(path), index)}: the file cannot be read further: {error}; {remedy}")


def _jsonl_rows(path: Path, bad: _Bad) -> Iterator[tuple[int, Any]]:
    index, read = -1, 0
    try:
        with _opened(path) as lines:
            for index, line in enumerate(lines):
                if index == 0:
                    _check_kind(path, line)
                line = (line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line).strip()
                if not line:
                    continue
                try:
                    value = _JSON.decode(line.decode())
                except (ValueError, RecursionError) as error:
                    bad(index, _json_reason(error))
                    continue
                read += 1
                yield index, value
    except _BROKEN as error:
        raise _broken(path, index + 1, error, read) from None


def _csv_rows(path: Path, bad: _Bad) -> Iterator[tuple[int, Any]]:
    """Rows of strings, named by the first line. A quoted field may hold line breaks (RFC 4180)."""
    tabs = _suffix(path).startswith(".tsv")
    wrong: list[str] = []  # what is wrong with the lines of the row being read

    def decoded(lines: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            if number == 1:
                _check_kind(path, line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                wrong.append(f"line {number}: {_json_reason(error)}")
                yield line.decode(errors="replace")

    csv.field_size_limit(sys.maxsize)  # a text may be long; the limit is of the process
    index, read = -1, 0
    try:
        with _opened(path) as lines:
            reader = csv.reader(decoded(lines), delimiter="\t" if tabs else ",", strict=True)
            names, start = _header(path, reader, wrong), reader.line_num + 1
            while True:
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    fields = []
                    wrong.append(f"line {start}: {error}; double every quote inside a quoted field")
                if fields is None:
                    return
                if fields and len(fields) != len(names):
                    columns = f"{len(names)} ({', '.join(names[:10])})"
                    separator = "tab" if tabs else "comma"
                    wrong.append(
                        f"line {start} has {_count(len(fields), 'field')} and the header {columns}; quote a field that "
                        f"holds a {separator}"
                    )
                if fields or wrong:
                    index += 1
                    if wrong:
                        bad(index, wrong[0])
                    else:
                        read += 1
                        yield index, dict(zip(names, fields, strict=True))
                wrong.clear()
                start = reader.line_num + 1
    except _BROKEN as error:
        raise _broken(path, index + 1, error, read) from None


def _header(path: Path, reader: Iterator[list[str]], wrong: list[str]) -> list[str]:
    """The column names in the first line that is not blank."""
    try:
        names = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise DataError(f"{path}: the header cannot be read: {error}; give the names of the columns") from None
    if wrong:
        raise DataError(f"{path}: the header: {wrong[0]}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the header has the column '{twice[0]}' twice; give each column a name of its own")
    return names


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _json_rows(path: Path, bad: _Bad) -> Iterator[tuple[int, Any]]:
    try:
        with _opened(path) as file:
            raw = file.read()
        _check_kind(path, raw)
        text = raw.decode("utf-8-sig").strip()
        value = _JSON.decode(text) if text else []
    except _BROKEN as error:
        raise DataError(f"{path} cannot be read: {error}; none of its rows can be used, so restore the file") from None
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        remedy = "; for one object a line (JSON Lines) name the file .jsonl" if lines else ""
        raise DataError(f"{path}: {_json_reason(error)}{remedy}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f'{path} holds neither a list of rows nor {{"data": [...]}}; for one row a line name it .jsonl')
    yield from enumerate(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a ValueError for a key that it has twice, of which Python would keep the last value alone."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return out


class _Twice(ValueError):
    """A key that one object has twice."""


_JSON = json.JSONDecoder(object_pairs_hook=_unique)

# How files begin that are no text in UTF-8, though their name may say so.
_MAGIC = {
    b"\x1f\x8b": "a gzip file; add .gz to its name",
    b"BZh91AY&SY": "a bzip2 file; add .bz2 to its name",
    b"\xfd7zXZ\x00": "an xz file; add .xz to its name",
    b"\x28\xb5\x2f\xfd": "a zstd file; add .zst to its name",
    b"PAR1\x15": "a parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "text in UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"\x00\x00\xfe\xff": "text in UTF-32; save it as UTF-8",
}


def _check_kind(path: Path, start: bytes) -> None:
    """Refuses a file of another kind than its name says, by its first bytes."""
    if kind := next((what for magic, what in _MAGIC.items() if start.startswith(magic)), ""):
        inside = " inside its compression" if _suffix(path).endswith(COMPRESSED) else ""
        raise DataError(f"{path} is by its first bytes{inside} {kind}")


def _no_object(value: Any, alone: bool) -> str:
    """What to say of a row that is no object; `alone` says that it is the first of a JSON Lines file."""
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    remedy = "; for one list of all rows name the file .json" if alone and isinstance(value, list) else ""
    return f"a row must be a JSON object with named columns, this is a {names.get(type(value), 'number')}{remedy}"


def _json_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} of it is not UTF-8 ({error.object[error.start]:#04x}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        listed = "; for one list of all rows name the file .json" if error.doc.strip() == "[" else ""
        return f"invalid JSON at {where}: {error.msg}{listed}"
    if isinstance(error, _Twice):
        return f"the key {shorten(str(error))} is twice in one object, and only one of them could be read; remove one"
    if isinstance(error, RecursionError):
        return "invalid JSON: lists or objects in each other, too deep to be read; flatten them"
    # int() raises nothing else
    # the one ValueError that is left, of int()
    return "invalid JSON: a whole number of more digits than can be read; write it as a string"


def _parquet_rows(path: Path, bad: _Bad) -> Iterator[tuple[int, Any]]:
    # imported here: it takes a fifth of a second that JSON data should not pay
    parquet = importlib.import_module("pyarrow.parquet")
    arrow_error = importlib.import_module("pyarrow").ArrowException
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path} has the column '{twice}' twice; give each column a name of its own")
            for batch in file.iter_batches(1024):
                for value in batch.to_pylist():
                    yield index, ArrowRow(value)
                    index += 1
    except (arrow_error, OSError, ValueError, OverflowError) as error:  # the last two: a value Python has no place for
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"{path} cannot be read as parquet after row {index}: {reason}; restore the file, or write it anew from "
            "its source"
        ) from None


_TEXT = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
_READERS: dict[str, Callable[[Path, _Bad], Iterator[tuple[int, Any]]]] = {
    **{kind + end: reader for end in ("", *COMPRESSED) for kind, reader in _TEXT.items()},
    ".parquet": _parquet_rows,
}


@lru_cache
def _hub_commit(name: str, revision: str | None) -> str:
    """The commit that a Hub data set's revision stands for now; a full commit is taken as it is, without network."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    hub = importlib.import_module("huggingface_hub")
    try:
        return str(hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # any of a dozen network and HTTP errors
        raise DataError(
            f"{name} is no local file, and the Hub does not answer for it as a data set ({first_line(error)}); give a "
            "file, or pin `revision` to a commit that is in the local cache"
        ) from None


def _hub_rows(source: DataSource) -> Iterator[tuple[int, Any]]:
    commit = _hub_commit(source.path, source.revision)
    # imported here: it takes seconds that local files should not pay
    datasets = importlib.import_module("datasets")
    index = 0
    try:
        if source.streaming:
            data = datasets.load_dataset(source.path, split=source.split, revision=commit, streaming=True)
        else:
            data = datasets.load_dataset(source.path, split=source.split, revision=commit)
        for index, row in enumerate(data):
            yield index, ArrowRow(row)
    except GeneratorExit:
        raise
    except Exception as error:  # whatever network, Hub and parser raise
        where = f"after row {index} " if index else ""
        raise DataError(
            f"{source.path} (split '{source.split}') cannot be loaded {where}from the Hub: {first_line(error)}; check "
            "the name and the split, or download the file and give its path"
        ) from None
