"""`tuner data check` as a user meets it: what it prints, its JSON, its exit codes; and its brief form before a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def tuner(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuner", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)


def chat(question: str, role: str = "user") -> dict[str, Any]:
    turns = [{"role": role, "content": question}, {"role": "assistant", "content": f"about {question}"}]
    return {"messages": turns}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.train={path}"


def test_text_json_and_exit_codes(recipe_file: Path, tmp_path: Path) -> None:
    rows = [chat(f"question {i}") for i in range(11)]
    clean = write(tmp_path / "clean.jsonl", rows)
    bad = write(tmp_path / "bad.jsonl", [*rows[:5], chat("hi", role="human"), *rows[6:]])
    done = tuner("data", "check", str(recipe_file), bad, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "         bad.jsonl line 6 (messages[0].role is 'human'" in done.stdout  # the path is relative to here
    done = tuner("data", "check", str(recipe_file), bad, "--json", "--strict", cwd=tmp_path)
    assert done.returncode == 2 and "the data has 1 error" in done.stderr and len(done.stderr.splitlines()) == 1
    report = json.loads(done.stdout)
    keys = "schema clean counts template train_on findings train eval plan preferences"
    assert list(report) == keys.split() and report["schema"] == 1
    assert (report["clean"], report["counts"]) == (False, {"error": 1, "warning": 0, "note": 0})
    (finding,) = report["findings"]
    assert list(finding) == ["kind", "severity", "count", "meaning", "remedy", "detail", "rows"]
    assert (finding["kind"], finding["severity"], finding["count"]) == ("unknown_role", "error", 1)
    assert [(Path(r["source"]).name, r["row"]) for r in finding["rows"]] == [("bad.jsonl", 6)]
    assert (report["train"]["rows"], report["train"]["samples"], report["eval"]) == (11, 10, None)
    assert sum(bar["samples"] for bar in report["train"]["histogram"]) == 10
    assert report["plan"]["steps"] == 4 and report["preferences"] is None
    assert not (tmp_path / "run").exists()
    done = tuner("data", "check", str(recipe_file), clean, "--strict", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "nothing wrong" in done.stdout


def test_a_run_says_first_what_is_odd(recipe_file: Path, tmp_path: Path) -> None:
    rows = [chat(f"question {i}") for i in range(9)]
    override = write(tmp_path / "data.jsonl", [*rows, rows[3]])
    done = tuner("sft", str(recipe_file), override, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert "check    warning: 1 of 10 samples repeat an earlier row to the token: data.jsonl line 10\n" in done.stdout
