"""Hostile names, files and streams at the command line: one sentence, the right exit code, nothing for a terminal."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tuner import recipe as recipes
from tuner.data.formats import shorten
from tuner.data.report import listed
from tuner.data.resolve import resolve_template
from tuner.data.show import look, page
from tuner.data.source import rows
from tuner.data.templates import fingerprint, recognise
from tuner.errors import ModelError, RunDirError, printable
from tuner.recipe import DataSection
from tuner.registry import did_you_mean

ROOT = Path(__file__).resolve().parent.parent
ESC = "\x1b[31m\x9b\u202e\ud800\nerror: no"
OWN = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SHOWN = "⟨U+001B⟩[31m⟨U+009B⟩⟨U+202E⟩⟨U+D800⟩⟨U+000A⟩error: no"


def tuner(*arguments: str, cwd: Path, cache: str = "cache") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tuner", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TUNER_CACHE": cache}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, timeout=120)


def chat(content: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"about {content}"}]
    return {"messages": turns, **more}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.train={json.dumps(str(path))}"


def harmless(output: bytes) -> bool:
    return not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output.decode())


def test_printable_writes_the_code_of_what_a_terminal_could_obey() -> None:
    assert printable(ESC) == SHOWN
    assert printable("plain ü 漢 🙂") == "plain ü 漢 🙂"
    assert printable("a\tb\u200bc\u2028d\x00") == "a⟨U+0009⟩b⟨U+200B⟩c⟨U+2028⟩d⟨U+0000⟩"


def test_names_of_columns_and_files_never_steer_the_terminal(recipe_file: Path, tmp_path: Path) -> None:
    rows = [chat("one", **{ESC: 1}), chat("two", **{ESC: 2})]
    override = write(tmp_path / "a\x1b[31m.jsonl", *rows)
    for command in (["data", "check"], ["sft", "--dry-run"]):
        done = tuner(*command, str(recipe_file), override, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == b""
        assert harmless(done.stdout) and SHOWN in done.stdout.decode() and "a⟨U+001B⟩[31m.jsonl" in done.stdout.decode()


def test_an_error_never_steers_the_terminal(recipe_file: Path, tmp_path: Path) -> None:
    override = write(tmp_path / "bad\x1b[2J.jsonl", {"pro\x1b[31mmpt\u202e": 1, "k" * 100_000: 2})
    done = tuner("data", "check", str(recipe_file), override, cwd=tmp_path)
    said = done.stderr.decode()
    assert done.returncode == 2 and harmless(done.stderr) and said.count("\n") == 1 and len(said) < 2000
    assert "bad⟨U+001B⟩[2J.jsonl line 1" in said and "the columns pro⟨U+001B⟩[31mmpt⟨U+202E⟩, kkk" in said


def test_a_closed_stdout_is_no_defect(recipe_file: Path, tmp_path: Path) -> None:
    override = write(tmp_path / "data.jsonl", chat("one"))
    code = "import os, runpy, sys; os.close(1); sys.stdout = None; runpy.run_module('tuner', run_name='__main__')"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "data", "show", str(recipe_file), override]
    done = subprocess.run(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", [["sft", "--dry-run"], ["data", "check"], ["data", "show"]])
def test_a_pipe_is_refused_instead_of_waited_for(command: list[str], recipe_file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    done = tuner(*command, str(recipe_file), f"data.train={tmp_path / 'pipe.jsonl'}", cwd=tmp_path)
    assert done.returncode == 2 and b"pipe.jsonl is a pipe or a device" in done.stderr


def test_a_home_that_is_not_there_is_a_name_like_another(recipe_file: Path, tmp_path: Path) -> None:
    override = write(tmp_path / "data.jsonl", chat("one"))
    done = tuner("sft", "--dry-run", str(recipe_file), override, cwd=tmp_path, cache="~nobody-of-that-name/x")
    assert done.returncode == 0 and (tmp_path / "~nobody-of-that-name/x/tokens").is_dir()
    done = tuner("data", "check", str(recipe_file), "data.train=~nobody-of-that-name/y.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and b"is not there" in done.stderr


def test_the_name_of_a_link_says_what_the_file_is(recipe_file: Path, tmp_path: Path) -> None:
    write(tmp_path / "0a1b2c", chat("one"))  # as in the Hub's cache, where a file is called by its hash
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "0a1b2c")
    (loaded,) = recipes.load(recipe_file, [f"data.train={tmp_path / 'train.jsonl'}"]).data.train
    assert loaded.path == str(tmp_path / "train.jsonl") and len(list(rows(loaded))) == 1


@pytest.mark.parametrize(
    "text", ["{{ 1 }}" * 300_000, "{{" * 1_000_000, "{{ '" + r"\'" * 45_000, r"{{ '" + r"\'" * 45_000 + "}}"]
)
def test_recognising_a_template_takes_no_longer_than_reading_it(text: str) -> None:
    before = time.process_time()
    assert recognise(text) is None
    fingerprint(text[:90_000])
    assert time.process_time() - before < 1.5


def test_fingerprints_of_unclosed_strings_and_tags_keep_all_of_them() -> None:
    texts = ["{{ 'a }}", "{{ 'ab }}", '{{ "a }}', "{{ 'a' }}", "{{ 'a", "{{ a", "{{ a }}{{  b", "{{ a }}{{ b"]
    assert len({fingerprint(text) for text in texts}) == len(texts)


def test_a_template_that_is_no_text_is_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = 5
    with pytest.raises(ModelError, match="is a int, not a text; mend its tokenizer_config.json"):
        resolve_template("auto", tokenizer)


def test_half_a_surrogate_pair_from_a_template_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = OWN + "{{ '\\ud800' }}"
    with pytest.raises(ModelError, match="writes half of a surrogate pair"):
        resolve_template("auto", tokenizer)
    tokenizer.chat_template = OWN + "{{ '<b>' | striptags }}"  # needs a module that is loaded late
    assert resolve_template("auto", tokenizer).name == "own"


def test_a_huge_row_is_shown_by_its_beginning(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", chat("one"), chat("word " * 300_000))
    for overlong, problem in (("error", "at least "), ("truncate", "")):
        data = DataSection(train=str(tmp_path / "a.jsonl"), chat_template="llama3", overlong=overlong)  # type: ignore[arg-type]
        (view,) = look(data, tiny_tokenizer, row=2).rows
        assert view.samples == () and len(view.raw) < 5000 and "word word" in view.raw
        assert "it has 3,000,006 characters, and only rows of up to 1,000,000" in view.notes[0]
        assert view.problem.startswith(problem) and bool(view.problem) == bool(problem)


def test_a_page_that_cannot_be_finished_is_removed(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", chat("one"))
    seen = look(DataSection(train=str(tmp_path / "a.jsonl"), chat_template="llama3"), tiny_tokenizer)  # type: ignore[arg-type]
    monkeypatch.setattr(page, "page", lambda _: "half \ud800")  # half of it can be written
    with pytest.raises(UnicodeEncodeError):
        page.write(seen, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()
    with pytest.raises(RunDirError, match="cannot be written: File name too long; give another file"):
        page.write(seen, tmp_path / ("x" * 300))


def test_huge_values_and_names_cost_nothing_in_a_message() -> None:
    before = time.process_time()
    assert did_you_mean("u" * 30_000_000, ["user", "system"]) == ""
    assert shorten("u" * 30_000_000) == "'" + "u" * 56 + "..." and shorten("u" * 58) == repr("u" * 58)
    assert shorten("u" * 59) == "'" + "u" * 56 + "..."
    assert listed(["a" * 61, *map(str, range(10))]) == "a" * 57 + "..., 0, 1, 2, 3, 4, 5, 6, 7, 8, ..."
    assert time.process_time() - before < 0.5
