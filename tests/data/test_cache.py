"""The cache: nothing changed tokenises nothing, anything changed is another entry, and no mishap harms a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from tuner.data import cache, render
from tuner.data.store import StoreBuilder
from tuner.data.stream import Split, load_split
from tuner.data.templates import TEMPLATES, Template
from tuner.errors import DataError
from tuner.recipe import DataSection, DataSource

LLAMA3 = TEMPLATES["llama3"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {i}", "completion": "" if i == 7 else "word " * (i % 5 + 1), "extra": 1} for i in range(40)
]
Write = Callable[..., str]


def load(
    tokenizer: PreTrainedTokenizerFast, train: Any, template: Template = LLAMA3, seed: int = 0, **settings: Any
) -> Split:
    data = DataSection(train=train, **settings)
    return load_split(data.train, data, tokenizer, template, seed=seed)


def entries() -> list[Path]:
    folder = cache.directory()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def render_batch(*_: object) -> None:
        raise AssertionError("a row was tokenised")

    monkeypatch.setattr(render.Renderer, "render_batch", render_batch)


def test_nothing_changed_tokenises_nothing(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": write(ROWS), "weight": 1.5}, {"path": write(ROWS[:9], "other.jsonl"), "weight": 0.5}]
    settings: dict[str, Any] = {"max_length": 24, "overlong": "drop"}
    first = load(tokenizer, sources, **settings)
    assert len(entries()) == 2 and first.report.number("dropped") and first.report.number("empty_answers")
    forbid(monkeypatch)
    again = load(tokenizer, sources, **settings)
    assert again.hash == first.hash
    assert again.report.as_dict() == first.report.as_dict()
    assert again.report.lines() == first.report.lines()
    assert [(s.source, s.row) for s in again.tokens] == [(s.source, s.row) for s in first.tokens]
    # the weights and their seed pick among the same tokens
    assert load(tokenizer, sources, seed=3, **settings).hash != first.hash
    assert len(entries()) == 2
    with pytest.raises(AssertionError, match="a row was tokenised"):
        load(tokenizer, sources, cache=False, **settings)


def test_the_same_bytes_elsewhere_are_the_same_entry(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tokenizer, write(ROWS))
    forbid(monkeypatch)
    other = write(ROWS, "copy.jsonl")
    again = load(tokenizer, other)
    assert again.hash == first.hash and {s.source for s in again.tokens} == {other}
    assert again.report.counts["empty_answers"].places == [f"{other} line 8"]
    assert again.report.sources[0].startswith(f"{other}: prompt_completion (")


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 500},
    "overlong": {"overlong": "drop"},
    "train_on": {"train_on": "last"},
    "ghost_attention": {"ghost_attention": True},
    "train_control_tokens": {"train_control_tokens": False},
    "on_bad_row": {"on_bad_row": "skip"},
    "format": {"format": "prompt_completion"},
    "columns": {"columns": {"prompt": "prompt"}},
    "parse_control_tokens": {},  # of text alone: see the key below
}
SOURCE_CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 39},
    "format": {"format": "prompt_completion"},
    "columns": {"columns": {"completion": "prompt"}},
    "split": {},  # of Hub ids alone
}


@pytest.mark.parametrize("settings", [c for c in CHANGES.values() if c])
def test_a_changed_setting_is_another_entry(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write(ROWS)
    load(tokenizer, path)
    load(tokenizer, path, **settings)
    assert len(entries()) == 2


@pytest.mark.parametrize("settings", [c for c in SOURCE_CHANGES.values() if c])
def test_a_changed_source_is_another_entry(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write(ROWS)
    load(tokenizer, path)
    load(tokenizer, {"path": path} | settings)
    assert len(entries()) == 2


def test_every_key_of_the_recipe_either_counts_or_is_known_not_to() -> None:
    """A key that is added later counts until somebody shows that it need not."""
    assert set(DataSection.model_fields) == cache.NOT_IN_KEY | set(CHANGES)
    assert set(DataSource.model_fields) == cache.NOT_IN_SOURCE_KEY | set(SOURCE_CHANGES)
    common: dict[str, Any] = {}
    base = cache.entry_key(common, DataSource(path="org/x"), "commit", "hub")
    assert base == cache.entry_key(common, DataSource(path="org/y", weight=2, revision="r"), "commit", "hub")
    others = [
        cache.entry_key(common, DataSource(path="org/x", split="test"), "commit", "hub"),
        cache.entry_key(common, DataSource(path="org/x"), "other", "hub"),
        cache.entry_key(common, DataSource(path="org/x"), "commit", ".jsonl"),
        cache.entry_key({"settings": 1}, DataSource(path="org/x"), "commit", "hub"),
    ]
    assert len({base, *others}) == 5


def test_a_changed_byte_with_size_and_time_as_before_gives_new_ids(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = Path(write(ROWS))
    before, first = path.stat(), load(tokenizer, str(path))
    path.write_text(path.read_text().replace("question 3", "question 4", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load(tokenizer, str(path)).hash != first.hash


def test_a_changed_template_gives_new_ids(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write(ROWS)
    first = load(tokenizer, path)
    assert load(tokenizer, path, TEMPLATES["chatml"]).hash != first.hash
    # the same name and text, other pieces: a template is code as well
    silent = dataclasses.replace(
        LLAMA3,
        pieces=lambda m, g=False, **kw: (
            [p._replace(owner=None) if p.text == "\n\n" else p for p in LLAMA3.pieces(m, g)]
            + [LLAMA3.pieces(m, True)[-4]]
        ),
    )
    assert load(tokenizer, path, silent).hash != first.hash
    load(tokenizer, path, dataclasses.replace(LLAMA3, jinja=LLAMA3.jinja + " "))
    load(tokenizer, path, dataclasses.replace(LLAMA3, options={"date_string": "1 Jan 2024"}, write=lambda **_: ""))
    assert len(entries()) == 5


def test_a_changed_tokenizer_is_another_entry(fresh_tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write(ROWS)
    first = load(fresh_tokenizer, path)
    fresh_tokenizer.backend_tokenizer.enable_truncation(3)
    fresh_tokenizer.backend_tokenizer.enable_padding(length=64)
    assert load(fresh_tokenizer, path).hash == first.hash and len(entries()) == 1  # rendering uses neither
    fresh_tokenizer.add_tokens([AddedToken("word ", special=True)])
    load(fresh_tokenizer, path)
    assert len(entries()) == 2
    fresh_tokenizer.eos_token = "<|eot_id|>"
    load(fresh_tokenizer, path)
    assert len(entries()) == 3


def test_changed_code_is_another_entry(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    load(tokenizer, path)
    monkeypatch.setattr(cache, "RENDERER_VERSION", "another")
    load(tokenizer, path)
    assert len(entries()) == 2


def test_the_version_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tuner" / "data"
    shutil.copytree(Path(cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(cache.__file__).parents[1] / "types.py", tmp_path / "tuner")
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    assert cache._version() == cache.RENDERER_VERSION
    with (package / "templates" / "plain.py").open("a") as file:
        file.write("\n")
    assert cache._version() != cache.RENDERER_VERSION


def test_errors_are_not_kept(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write([*ROWS, {"prompt": 3, "completion": "a"}])
    for _ in range(2):
        with pytest.raises(DataError, match="line 41: prompt is 3"):
            load(tokenizer, path)
    assert entries() == []


@pytest.mark.parametrize("name", ["ids.bin", "weights.bin", "store.json", "report.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_anew(
    name: str, harm: str, tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    first = load(tokenizer, path)
    (entry,) = entries()
    good = (entry / name).read_bytes()
    if harm == "remove":
        (entry / name).unlink()
    else:
        # inside of the figures of the JSON files, so that they stay readable
        at = good.rindex(b"1") if name.endswith(".json") else 0
        (entry / name).write_bytes(good[:at] + bytes([good[at] ^ 3]) + good[at + 1 :] if harm == "flip" else good[:-2])
    again = load(tokenizer, path)
    assert again.hash == first.hash and again.report.as_dict() == first.report.as_dict()
    assert entries() == [entry] and (entry / name).read_bytes() == good
    forbid(monkeypatch)
    assert load(tokenizer, path).hash == first.hash


def test_an_unwritable_folder_is_a_line_of_warning(
    tokenizer: PreTrainedTokenizerFast, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    expected = load(tokenizer, path, cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "file"))
    split = load(tokenizer, path)
    assert split.hash == expected.hash
    (line,) = [line for line in split.report.lines() if line.startswith("warning: the tokens of")]
    assert path in line and "Not a directory" in line
    assert split.report.as_dict() == expected.report.as_dict()


@pytest.mark.parametrize("step", ["add", "finish"])
def test_a_full_disk_is_a_line_of_warning(
    step: str, tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    expected = load(tokenizer, path, cache=False)
    real = getattr(StoreBuilder, step)

    def full(self: StoreBuilder, *args: Any) -> Any:
        if self.directory is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    monkeypatch.setattr(StoreBuilder, step, full)
    split = load(tokenizer, path)
    assert split.hash == expected.hash and split.report.as_dict() == expected.report.as_dict()
    assert "No space left on device" in split.report.lines()[-1]
    assert entries() == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    real = render.Renderer.render_batch

    def meddle(self: render.Renderer, *args: Any) -> Any:
        write(ROWS[:20])
        return real(self, *args)

    monkeypatch.setattr(render.Renderer, "render_batch", meddle)
    with pytest.raises(DataError, match="was changed while it was read; start again"):
        load(tokenizer, path)
    assert entries() == []


def test_the_longest_unused_go_when_there_is_no_room(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(ROWS[: 10 + i], f"{i}.jsonl") for i in range(4)]
    made = []
    for i, path in enumerate(paths[:3]):
        load(tokenizer, path)
        (new,) = set(entries()) - set(made)
        os.utime(new, (1000 + i, 1000 + i))
        made.append(new)
    load(tokenizer, paths[0])  # used again, and so the newest
    left = cache.directory() / "tmp-left"
    left.mkdir()
    os.utime(left, (1000, 1000))
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * sum(f.stat().st_size for f in made[2].iterdir()))
    load(tokenizer, paths[3])
    assert set(made) - set(entries()) == {made[1]}
    assert not left.exists() and len(entries()) == 3
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    split = load(tokenizer, write(ROWS, "large.jsonl"))
    assert len(entries()) == 1 and len(split.tokens) == 40  # what was just made is kept


def test_two_processes_at_once_leave_one_good_entry(
    tokenizer: PreTrainedTokenizerFast, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys
from transformers import PreTrainedTokenizerFast
from tuner.data import render
from tuner.data.stream import load_split
from tuner.data.templates import TEMPLATES
from tuner.recipe import DataSection
names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], **names)
real = render.Renderer.render_batch
def wait(self, *args):  # until both have looked for the entry and found none
    print("ready", flush=True)
    sys.stdin.readline()
    return real(self, *args)
render.Renderer.render_batch = wait
data = DataSection(train=sys.argv[1])
print(load_split(data.train, data, tokenizer, TEMPLATES["llama3"]).hash)
"""
    path = write(ROWS)
    golden = str(Path(__file__).parents[1] / "golden" / "tokenizer.json")
    command = [sys.executable, "-c", code, path, golden]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert [e.name.startswith(cache.UNFINISHED) for e in entries()] == [True, True]
    said = [process.communicate("go\n")[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (entry,) = entries()
    assert not entry.name.startswith(cache.UNFINISHED)
    forbid(monkeypatch)
    assert said == [load(tokenizer, path).hash] * 2


def test_the_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/.cache/tuner/tokens")
    monkeypatch.setenv("TUNER_CACHE", "~/mine")
    assert cache.directory() == Path("/somewhere/mine/tokens")


def test_an_entry_holds_no_pickle(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    load(tokenizer, write(ROWS))
    (entry,) = entries()
    assert {f.suffix for f in entry.iterdir()} == {".bin", ".json"}
    header = json.loads((entry / "store.json").read_text())
    assert (entry / "ids.bin").stat().st_size == header["arrays"]["ids"]["bytes"] == 4 * _tokens(entry)


def _tokens(entry: Path) -> int:
    stored = json.loads((entry / "report.json").read_text())
    assert stored["report"]["report"]["rows_read"] == 40
    return cache.load(entry).span_ends[-1].item()
