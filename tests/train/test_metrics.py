"""Lines of the log: means that do not depend on how often they are written, also over a resume; and trackers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuner.errors import RecipeError
from tuner.train import metrics as module
from tuner.train.loop import StepReport
from tuner.train.metrics import Metrics, peak_memory_bytes, start_trackers


def report(loss: float, trained: float, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "losses": {"nll": loss},
        "grad_norm": loss / 2,
        "learning_rate": loss / 10,
        "tokens": 100,
        "trained_tokens": trained,
        "seconds": 2.0,
    }
    return StepReport(**(values | changes))


REPORTS = [report(4.0, 10), report(2.0, 30), report(1.0, 20), report(8.0, 1), report(0.5, 9)]


class Lines(list[dict[str, Any]]):
    def __call__(self, row: dict[str, Any]) -> None:
        self.append(json.loads(json.dumps(row)))


def metrics(lines: Lines, every: int, num_steps: int = 5, console: Console | None = None, **changes: Any) -> Metrics:
    console = console or Console(file=io.StringIO(), force_terminal=False)
    options: dict[str, Any] = {"trackers": (), "device": torch.device("cpu")} | changes
    return Metrics(append=lines, num_steps=num_steps, every=every, console=console, **options)


def write(every: int, cuts: tuple[int, ...] = ()) -> Lines:
    """The lines of all reports; at each cut the window goes through JSON into a new object, as over a resume."""
    lines = Lines()
    log = metrics(lines, every)
    log.start(0)
    for step, one in enumerate(REPORTS, start=1):
        log.step(step, one)
        if step in cuts:
            window = json.loads(json.dumps(log.window()))
            log = metrics(lines, every)
            log.restore(window)
            log.start(step)
    return lines


def test_a_line_a_step() -> None:
    lines = write(1)
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in lines] == [4.0, 2.0, 1.0, 8.0, 0.5]
    keys = "step loss learning_rate grad_norm tokens trained_tokens tokens_per_second seconds memory_bytes"
    assert list(lines[0]) == keys.split()
    assert lines[0]["tokens_per_second"] == 50.0


def test_a_line_of_several_steps_weighs_them_by_their_tokens() -> None:
    lines = write(2)
    assert [row["step"] for row in lines] == [2, 4, 5]  # the last step is always written
    assert lines[0]["loss"] == (4.0 * 10 + 2.0 * 30) / 40
    assert (lines[0]["tokens"], lines[0]["trained_tokens"], lines[0]["seconds"]) == (200, 40, 4.0)
    assert lines[0]["learning_rate"] == 0.2
    for every in (1, 2, 3, 5):
        rows = write(every)
        mean = sum(r["loss"] * r["trained_tokens"] for r in rows) / sum(r["trained_tokens"] for r in rows)
        assert mean == pytest.approx(sum(r.losses["nll"] * r.trained_tokens for r in REPORTS) / 70)


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (1, 2, 4)])
def test_a_resumed_window_is_whole(cuts: tuple[int, ...]) -> None:
    def values(lines: Lines) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "memory_bytes"} for row in lines]

    assert values(write(3, cuts)) == values(write(3))


def test_several_terms_and_skipped_steps_are_listed() -> None:
    lines = Lines()
    log = metrics(lines, 2, num_steps=2)
    log.start(0)
    log.step(1, report(3.0, 1, losses={"nll": 1.0, "kl": 2.0}))
    log.step(2, report(3.0, 3, losses={"nll": 5.0, "kl": 2.0}, skipped=True))
    (row,) = lines
    assert (row["nll"], row["kl"], row["loss"], row["skipped_steps"]) == (1.0, 2.0, 3.0, 1)  # of the step that was done


def test_an_evaluation_is_a_line_of_its_own() -> None:
    lines = Lines()
    metrics(lines, 1).note(3, {"eval_loss": 1.5})
    assert lines == [{"step": 3, "eval_loss": 1.5}]


def test_without_a_terminal_about_twenty_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    out = io.StringIO()
    log = metrics(Lines(), 1, num_steps=100, console=Console(file=out, width=200))
    log.start(50)  # resumed half way
    for step in range(51, 101):
        log.step(step, report(1.0, 10))
    log.close()
    printed = out.getvalue().splitlines()
    assert len(printed) == 10
    assert printed[0].startswith("step  55/100  loss 1.0000  lr 1.00e-01  50 tok/s  ETA ")
    assert 5 <= int(printed[0].split()[-2]) <= 60  # by the pace since the resume: about a second for each step here


def test_memory_is_counted_in_bytes() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


# --- trackers ---


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"log.report_to: unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?"
    ):
        start_trackers(["tensorbord"], "run", str(tmp_path), {})


def test_a_tracker_whose_library_is_absent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_available_trackers", list)
    with pytest.raises(RecipeError, match="the library of 'wandb' is not installed"):
        start_trackers(["wandb"], "run", str(tmp_path), {})


def test_tensorboard_writes(tmp_path: Path) -> None:
    trackers = start_trackers(["tensorboard"], "chat", str(tmp_path), {"learning_rate": 0.1, "eval": None})
    log = metrics(Lines(), 1, trackers=trackers)
    log.start(0)
    log.step(1, REPORTS[0])
    log.note(1, {"eval_loss": 2.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "chat"))
    events.Reload()
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["loss"] == [4.0] and scalars["eval_loss"] == [2.5]
