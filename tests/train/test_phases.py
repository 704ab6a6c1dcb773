"""Seconds of the phases of a run: nothing is counted twice, nothing is left out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuner import recipe as recipes
from tuner.stages import sft
from tuner.train import phases as module
from tuner.train.phases import Phases


def test_phases_add_up_and_a_phase_inside_another_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(Phases, "_taken", True)
    clock = Phases()
    clock.begin("training")
    with clock.during("saving"):
        pass
    clock.begin("saving")
    assert clock.seconds() == {"setup": 1.0, "training": 2.0 + 4.0, "saving": 3.0 + 5.0}


def test_the_first_run_of_a_process_counts_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Phases, "_taken", False)
    monkeypatch.setattr(module, "_process_age", lambda: 100.0)
    assert Phases().seconds()["setup"] >= 100.0
    assert Phases().seconds()["setup"] < 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_the_age_of_a_process_is_what_the_clock_says() -> None:
    code = "from tuner.train.phases import _process_age as age; import time; time.sleep(0.5); print(age())"
    started = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(said) <= time.perf_counter() - started + 0.02  # the kernel counts hundredths


def test_a_run_records_its_phases(recipe_file: Path, chats_file: Path, tmp_path: Path) -> None:
    Phases()  # so that the start of the tests is not this run's
    recipe = recipes.load(recipe_file, [f"data.eval={chats_file}", "eval.steps=2"], stage="sft")
    started = time.perf_counter()
    sft.run(recipe)
    elapsed = time.perf_counter() - started
    seconds = json.loads((tmp_path / "run" / "manifest.json").read_text())["seconds"]
    names = ["setup", "data", "model", "evaluation before", "training", "evaluation between", "saving"]
    assert list(seconds) == [*names, "evaluation after"]
    assert all(value > 0 for value in seconds.values())
    assert 0.9 * elapsed < sum(seconds.values()) <= elapsed
