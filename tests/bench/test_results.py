"""Results: one schema for all, ratios and differences as they say, and the README made from nothing else."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import common
import pytest
import table
import workplace
from common import Side

from tuner.errors import UserError

FIELDS = {"schema", "name", "command", "date", "commit", "dirty", "machine", "versions", "cases"}
OF_A_CASE = {
    "name", "settings", "headline", "better", "sides", "against", "ratios", "loss_differences", "floor", "notes",
}  # fmt: skip
RUNS = {
    "tuner": [{"rate": 30.0, "environment": {"threads": "2"}}, {"rate": 44.0}],
    "trl": [{"rate": 10.0}, {"rate": 11.0}],
}


def made(**changes: Any) -> dict[str, Any]:
    sides = {"tuner": Side(), "trl": Side({"bf16": True}, "default")}
    parity = {"tuner": [1.0, 0.9], "trl": [1.0, 0.95]}
    return common.case("a case", "rate", sides, RUNS, settings={}, against="trl", parity=parity, **changes)


def check(result: dict[str, Any]) -> None:
    """A result of the schema: every field, every side with its runs, numbers that are numbers."""
    assert result.keys() == FIELDS and result["schema"] == common.SCHEMA and result["cases"]
    for case in result["cases"]:
        assert case.keys() == OF_A_CASE
        assert case["against"] is None or case["against"] in case["sides"]
        for side in case["sides"].values():
            assert side.keys() == {"settings", "environment", "runs", "parity_losses"}
            for run in side["runs"]:
                assert math.isfinite(run[case["headline"]])


def test_ratios_are_turn_by_turn_and_differences_step_by_step() -> None:
    one = made()
    assert one["ratios"] == {"tuner": {"median": 3.5, "low": 3.0, "high": 4.0, "turns": [3.0, 4.0]}}
    assert one["loss_differences"]["tuner"] == pytest.approx([0.0, -0.05])
    assert one["sides"]["tuner"]["environment"] == {"variables_of": "tuner", "threads": "2"}
    assert one["sides"]["trl"]["environment"]["variables_of"] == "default"
    assert made(better="lower")["ratios"]["tuner"]["turns"] == pytest.approx([1 / 3, 1 / 4])


def test_what_is_written_is_of_the_schema(tmp_path: Path) -> None:
    result = common.read(common.write("name", [made()], tmp_path / "name.json"))
    check(result)
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"]
    assert result["commit"] is None or len(result["commit"]) == 40


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_are_of_the_schema(path: Path) -> None:
    check(common.read(path))


def test_the_table_of_readme_is_made_from_the_committed_results() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.put(text, table.table(common.RESULTS)) == text, "python scripts/bench/table.py --write"


def test_the_table_says_what_the_results_say_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    one = made() | {"name": "DPO, LoRA", "headline": "rate"}
    (tmp_path / "dpo.json").write_text(json.dumps(json.loads(_written(tmp_path, one)) | {"name": "dpo"}))
    rows = table.table(tmp_path).splitlines()
    assert "| tuner: ... the prompt shared | 37.00 | 30.00 - 44.00 | 3.50 (3.00 - 4.00) |  | 5.0e-02 |" in rows
    assert "| TRL at its best | 10.50 | 10.00 - 11.00 |  |  |  |" in rows
    gpu = rows[next(i for i, row in enumerate(rows) if "8B Llama on a GPU" in row) :]
    assert "| tuner, 16,384 tokens at once | | | | | |" in gpu
    assert not any(cell.strip() for row in gpu if row.startswith("| tuner") for cell in row.split("|")[2:])


def _written(folder: Path, case: dict[str, Any]) -> str:
    path = common.write("dpo", [case], folder / "made.json")
    text = path.read_text(encoding="utf-8")
    path.unlink()
    return text


def test_a_side_that_fails_is_left_out_with_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "if sys.argv[2] == 'bad': sys.exit('it cannot run here')\n"
        "print(json.dumps({'rate': 2.0, 'environment': {}}))\n"
    )
    turns = common.take_turns(str(script), {"good": Side({}, "default"), "bad": Side({}, "default")}, [], 2, "rate")
    assert [run["rate"] for run in turns.runs["good"]] == [2.0, 2.0] and turns.runs["bad"] == []
    assert turns.notes == ["bad did not run (exit 1): it cannot run here"]
    over = common.take_turns(str(script), {"good": Side({}, "default")}, [], 2, "rate", deadline=-math.inf)
    assert over.runs["good"] == [] and "the time was up" in over.notes[0]


def test_both_sides_get_the_variables_of_our_command_line_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(common.PLAIN, "GOMP_SPINCOUNT", raising=False)
    assert "GOMP_SPINCOUNT" in common.variables("tuner")
    assert "GOMP_SPINCOUNT" not in common.variables("default")
    assert common.variables("tuner")["HF_HUB_OFFLINE"] == common.variables("default")["HF_HUB_OFFLINE"] == "1"


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no result of schema 1"),
        ('{"name": "theirs"}', "is no result of schema 1"),
        ('{"schema": 1, "cases": []}', "has no command, commit, date"),
    ],
)
def test_a_file_that_is_no_result(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(UserError, match=rf"sft.json .*{message}.*run the benchmark again"):
        table.table(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A heading\n", "line 1: expected a JSON object with question and answer"),
        ('{"question": "a", "answer": "b"}\n{"text": "c"}\n', "line 2: expected a JSON object"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: expected .* messages of two turns"),
        ("", "holds no rows"),
        (None, "No such file or directory; give a JSONL file"),
    ],
)
def test_data_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"rows.jsonl.* {message}"):
        workplace.read_pairs(path)


def test_a_place_that_cannot_be_written_is_refused_before_the_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for there in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot write '"):
            common.output(str(there))
    assert common.output(str(tmp_path / "new" / "result.json")) == tmp_path / "new" / "result.json"
    assert not (tmp_path / "new" / "result.json").exists()
    for text in ("0", "-1", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number of at least 1, got '{text}'"):
            common.count(text)


def test_a_script_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(error: BaseException) -> int | str | None:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            common.run(main)
        return end.value.code

    assert (ends(UserError("no such file")), ends(KeyboardInterrupt())) == (2, 130)
    assert capsys.readouterr().err.startswith("error: no such file\nerror: stopped by SIGINT")
