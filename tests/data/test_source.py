from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
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


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
TEXTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": "text\na\nb\nü\n".encode(),
    ".tsv": "\ufefftext\r\na\r\nb\r\nü".encode(),
}


@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_text_may_be_compressed(kind, end, tmp_path):
    path = tmp_path / f"x{kind}{end}"
    path.write_bytes(PACK[end](TEXTS[kind]))
    assert read(path) == list(enumerate(ROWS))


@pytest.mark.parametrize("end", [end for end in PACK if end])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json"])
def test_a_truncated_file_says_what_is_left_of_it(kind, end, tmp_path):
    rows_ = [{"text": hashlib.sha256(b"%d" % i).hexdigest() * 9} for i in range(3000)]
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows_),
        ".csv": "text\n" + "".join(row["text"] + "\n" for row in rows_),
        ".json": json.dumps(rows_),
    }[kind]
    path = tmp_path / f"x{kind}{end}"
    whole = PACK[end](text.encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        read(path)
    said = str(error.value)
    assert str(path) in said and "restore the file" in said
    if kind == ".json":
        assert "none of its rows can be used" in said
    elif "limit: " in said:  # bzip2 gives nothing before the end of its first block
        left = int(said.split("limit: ")[1].rstrip(")"))
        before = itertools.islice(rows(DataSource(path=str(path))), left)  # what a `limit` does
        assert 0 < left < 3000 and [row for _, row in before] == rows_[:left]
        assert f"{'line' if kind == '.jsonl' else 'row'} {left + 1}: the file cannot be read further" in said


def test_zstd_without_support_is_a_clear_sentence(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"any")
    arrow = SimpleNamespace(Codec=SimpleNamespace(is_available=lambda name: False))
    monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=lambda name: arrow))
    with pytest.raises(DataError, match="x.jsonl.zst: this pyarrow cannot read zstd; compress the file with gzip"):
        read(path)


def test_csv_fields_may_be_quoted_and_hold_line_breaks(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('q,a\n"one, two","line 1\nline ""2"""\n\nplain,\n', encoding="utf-8")
    assert read(path) == [(0, {"q": "one, two", "a": 'line 1\nline "2"'}), (1, {"q": "plain", "a": ""})]
    long = "word " * 100_000
    path.write_text(f"q,a\nx,{long}\n")
    assert read(path)[0][1]["a"] == long


def test_bad_rows_of_csv_are_named_by_line_and_passed_over(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'q,a\n"x\ny",1\nonly\na,b,c\n\xff,2\n"p"q,3\nlast,4\n"never\nends,5\n')
    bad = {}
    found = list(rows(DataSource(path=str(path)), on_bad=lambda index, error: bad.update({index: str(error)})))
    assert found == [(0, {"q": "x\ny", "a": "1"}), (5, {"q": "last", "a": "4"})]
    assert sorted(bad) == [1, 2, 3, 4, 6]
    assert "x.csv row 2: line 4 has 1 field and the header 2 (q, a); quote a field that holds a comma" in bad[1]
    assert "row 3: line 5 has 3 fields" in bad[2]
    assert "row 4: line 6: byte 0 of it is not UTF-8 (0xff)" in bad[3]
    assert "row 5: line 7: " in bad[4] and "row 7: line 9: unexpected end of data" in bad[6]
    with pytest.raises(DataError, match="row 2: line 4 has 1 field"):
        read(path)


def test_a_sources_content_and_kind_are_known(write, tmp_path):
    source = DataSource(path=write(ROWS, "x.jsonl"))
    before = module.stamp(source)
    assert module.kind_of_file(source) == ".jsonl" and before == module.stamp(source)
    write([*ROWS, *ROWS], "x.jsonl")
    assert module.stamp(source) != before


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
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:40], "the file cannot be read further"),
        ("x.jsonl.gz", b'{"text": "a"}\n', "x.jsonl.gz line 1: the file cannot be read further"),
        ("x.json.gz", gzip.compress(b'[{"text": "a"}]', mtime=0)[:-9], "cannot be read"),
        ("x.parquet", b"PAR1 nothing", "cannot be read as parquet after row 0"),
        ("x.csv", b"", "holds no rows"),
        ("x.csv", b"text\n", "holds no rows"),
        ("x.csv", b"a,b,a\n1,2,3\n", "the header has the column 'a' twice"),
        ("x.csv", b"\xff,b\n1,2\n", "the header: line 1: byte 0 of it is not UTF-8"),
        ("x.csv", b'"a"b,c\n1,2\n', "the header cannot be read"),
        ("x.jsonl.zst", b'{"text": "a"}\n', "x.jsonl.zst line 1: the file cannot be read further"),
        ("x.jsonl.xz", b'{"text": "a"}\n', "x.jsonl.xz line 1: the file cannot be read further"),
        ("x.jsonl.bz2", b'{"text": "a"}\n', "x.jsonl.bz2 line 1: the file cannot be read further"),
        ("x.toml", b"text\na\n", "files of this kind cannot be read; known: .jsonl"),
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
    with pytest.raises(DataError, match="`streaming` is for Hub ids; remove it"):
        read(path, streaming=True)


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


def test_a_streamed_hub_id_is_read_no_further_than_asked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn, asked = [], []

    def endless():
        for i in range(10**9):
            drawn.append(i)
            yield {"text": str(i)}

    def load_dataset(path, *, split, revision, streaming):
        asked.append((path, split, revision, streaming))
        return endless()

    _pretend(monkeypatch, datasets=SimpleNamespace(load_dataset=load_dataset))
    stream = rows(DataSource(path="org/name", revision=COMMIT, streaming=True))
    assert [next(stream) for _ in range(3)] == [(i, {"text": str(i)}) for i in range(3)]
    stream.close()
    assert asked == [("org/name", "train", COMMIT, True)] and len(drawn) <= 4


def test_a_stream_that_breaks_says_after_which_row(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def breaks():
        yield from ROWS
        raise OSError("connection reset")

    _pretend(monkeypatch, datasets=SimpleNamespace(load_dataset=lambda *_, **__: breaks()))
    with pytest.raises(DataError, match="cannot be loaded after row 2 from the Hub: connection reset"):
        read("org/name", revision=COMMIT, streaming=True)


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


def test_a_key_twice_in_a_row_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n{"m": [{"k": 1, "k": 2}]}\n')
    seen = []
    found = list(rows(DataSource(path=str(tmp_path / "a.jsonl")), on_bad=lambda i, e: seen.append((i, str(e)))))
    assert found == [(0, {"text": "a"})] and [i for i, _ in seen] == [1, 2]
    assert "a.jsonl line 2: the key 'text' is twice in one object" in seen[0][1]
    (tmp_path / "a.json").write_text('[{"text": "b", "text": "c"}]')
    with pytest.raises(DataError, match=r"a\.json: the key 'text' is twice"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "a gzip file; add .gz"),
        ("x.json", bz2.compress(b"[]"), "a bzip2 file; add .bz2"),
        ("x.csv", lzma.compress(b"a,b"), "an xz file; add .xz"),
        ("x.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "inside its compression a gzip file"),
        ("x.jsonl", b"PAR1\x15\x04", "a parquet file; name it .parquet"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        ("x.csv", b"BZhour,PAR1\n1,2\n", None),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    if said is None:
        assert read(tmp_path / name) == [(0, {"BZhour": "1", "PAR1": "2"})]
        return
    with pytest.raises(DataError, match=said):
        list(rows(DataSource(path=str(tmp_path / name)), on_bad=lambda *_: None))


def test_a_file_without_one_readable_row_says_what_is_wrong_with_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": \n')
    with pytest.raises(DataError, match=r"none of the 2 rows of .*a\.jsonl can be read; the first: .* line 1: byte 13"):
        list(rows(DataSource(path=str(tmp_path / "a.jsonl")), on_bad=lambda *_: None))


@pytest.mark.parametrize("text", ['[{"text": "a"}]\n', '[\n{"text": "a"}\n]\n'])
def test_a_list_in_a_jsonl_file_is_told_from_rows(text, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"line 1: .*for one list of all rows name the file \.json$"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "value, said",
    [("null", "a null"), ("1.5", "a number"), ("true", "a boolean"), ("[1]", "a list"), ('"x"', "a string")],
)
def test_what_is_no_object_is_called_as_in_json(value, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{value}\n')
    with pytest.raises(DataError, match=f"line 2: a row must be a JSON object with named columns, this is {said}$"):
        read(tmp_path / "a.jsonl")


def test_a_parquet_value_that_python_cannot_hold_names_the_file(tmp_path):
    far = pa.table({"text": ["a"], "when": pa.array([2**62], pa.timestamp("us"))})
    twins = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    for table in (far, pa.table({"text": ["a"], "s": twins})):
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet after row 0: .*; restore the file"):
            read(tmp_path / "a.parquet")


def test_a_parquet_column_twice_is_refused(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'text' twice"):
        read(tmp_path / "a.parquet")
