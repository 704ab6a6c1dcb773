from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuner.data import source as module
from tuner.data.source import content_hash, rows
from tuner.errors import DataError
from tuner.recipe import DataSource

ROWS = [{"text": "a"}, {"text": "b"}, {"text": "ü"}]


def read(path, **kwargs):
    return list(rows(DataSource(path=str(path), **kwargs)))


def test_json_lines_are_numbered_by_line_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b\xe2\x80\xa8c"}')
    assert read(path) == [(0, {"text": "a"}), (2, {"text": "b\u2028c"})]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    (tmp_path / "d.json").write_text(json.dumps({"data": ROWS, "version": 1}))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    expected = list(enumerate(ROWS))
    assert [read(p) for p in sorted(tmp_path.iterdir())] == [expected] * 6


def test_json_rows_are_not_forced_into_one_schema(write):
    planted = [{"text": "x", "args": {"a": 1}}, {"text": "x", "args": {"b": [None, 2.0], "c": None}}]
    assert [row for _, row in read(write(planted))] == planted


def test_reading_json_imports_neither_datasets_nor_pyarrow(write):
    code = (
        "import sys; from tuner.data.source import rows; from tuner.recipe import DataSource;"
        "list(rows(DataSource(path=sys.argv[1]))); assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, write(ROWS)], check=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", "holds no rows"),
        ("x.jsonl", b"\n\n", "holds no rows"),
        ("x.json", b"[]", "holds no rows"),
        ("x.json", b"", "holds no rows"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl line 2: invalid JSON at column"),
        ("x.jsonl", b'{"text": "a"}\n[1]\n', "x.jsonl line 2: a row must be a JSON object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "x.jsonl line 2: byte 10 of it is not UTF-8 (0xff)"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl line 1: invalid JSON"),
        ("x.json", b'{"text": "a"}\n{"text": "b"}\n', "for one object a line (JSON Lines) name the file .jsonl"),
        ("x.json", b'{"text": "a"}', "holds neither a list of rows"),
        ("x.json", b'[{"text": "a"}, 3]', "x.json row 2: a row must be a JSON object"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:40], "the file cannot be read further"),
        ("x.jsonl.gz", b'{"text": "a"}\n', "x.jsonl.gz line 1: the file cannot be read further"),
        ("x.json.gz", gzip.compress(b'[{"text": "a"}]')[:-9], "cannot be read"),
        ("x.parquet", b"PAR1 nothing", "cannot be read as parquet after row 0"),
        ("x.csv", b"text\na\n", "files of this kind cannot be read; known: .jsonl"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert said in str(error.value) and name in str(error.value)


def test_unreadable_rows_can_be_reported_and_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n7\n{"text": "b"}\n')
    bad = []
    found = list(rows(DataSource(path=str(path)), on_bad=lambda index, error: bad.append((index, str(error)))))
    assert [index for index, _ in found] == [0, 3]
    assert [index for index, _ in bad] == [1, 2] and "line 2" in bad[0][1]


def test_missing_files_directories_splits_and_revisions(tmp_path, write):
    path = write(ROWS)
    with pytest.raises(DataError, match=r"does not exist .did you mean 'data.jsonl'"):
        read(tmp_path / "dat.jsonl")
    with pytest.raises(DataError, match="is a directory; name a file in it: data.jsonl"):
        read(tmp_path)
    with pytest.raises(DataError, match="has no split 'test'"):
        read(path, split="test")
    with pytest.raises(DataError, match="has no revision 'main'"):
        read(path, revision="main")


def test_a_hub_id_is_refused_where_a_folder_of_its_name_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(DataError, match="org/name does not exist, and as a folder of that name does"):
        read("org/name")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _pretend(monkeypatch, **modules):
    """Stands in for `datasets` and `huggingface_hub`, which need a network."""
    module._hub_commit.cache_clear()
    monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=lambda name: modules[name]))


def test_a_hub_id_is_pinned_to_its_commit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(path, *, split, revision):
        asked.append((path, split, revision))
        return ROWS

    def dataset_info(self, name, *, revision, timeout):
        return SimpleNamespace(sha=COMMIT)

    _pretend(
        monkeypatch,
        datasets=SimpleNamespace(load_dataset=load_dataset),
        huggingface_hub=SimpleNamespace(HfApi=type("HfApi", (), {"dataset_info": dataset_info})),
    )
    assert read("org/name", split="test") == list(enumerate(ROWS))
    assert asked == [("org/name", "test", COMMIT)]
    assert content_hash(DataSource(path="org/name")) == COMMIT


def test_a_hub_id_without_network_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError("no route\nto host")

    _pretend(
        monkeypatch,
        datasets=SimpleNamespace(load_dataset=refuse),
        huggingface_hub=SimpleNamespace(HfApi=type("HfApi", (), {"dataset_info": refuse})),
    )
    with pytest.raises(DataError, match=r"org/name is no local file, .*no route\); give a file"):
        read("org/name")
    with pytest.raises(DataError, match=r"cannot be loaded from the Hub: no route"):
        read("org/name", revision=COMMIT)


def test_content_hash_is_that_of_the_bytes(write):
    path = write(ROWS)
    before = content_hash(DataSource(path=path))
    with open(path, "rb") as file:
        assert before == hashlib.sha256(file.read()).hexdigest()
    write([*ROWS[:2], {"text": "u"}])
    assert content_hash(DataSource(path=path)) != before
