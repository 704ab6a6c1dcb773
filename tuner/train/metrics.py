"""Step reports -> metrics.jsonl, experiment trackers, and one line or a progress bar for the person who waits."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuner.errors import RecipeError
from tuner.registry import did_you_mean
from tuner.train.loop import StepReport

SHOWN = ("accuracy", "margin")  # metrics of a step that stand beside its loss
LINES = 20  # printed over a whole run where there is no terminal to draw a bar on


def start_trackers(names: Sequence[str], run_name: str, directory: str, config: dict[str, Any]) -> list[GeneralTracker]:
    """accelerate's trackers (`tensorboard`, `wandb`, ...), started and told the recipe.

    Raises:
        RecipeError: an unknown name, or a library that is not installed.
    """
    trackers = []
    for kind in tracker_classes(names):
        tracker = kind(run_name, logging_dir=directory) if kind.requires_logging_directory else kind(run_name)
        tracker.start()
        tracker.store_init_configuration({k: v for k, v in config.items() if isinstance(v, (str, int, float, bool))})
        trackers.append(tracker)
    return trackers


def tracker_classes(names: Sequence[str]) -> list[type[GeneralTracker]]:
    """The class of each tracker. RecipeError: an unknown name, or a library that is not installed."""
    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    classes = {str(getattr(k, "value", k)): v for k, v in LOGGER_TYPE_TO_CLASS.items()}
    for name in names:
        if name not in classes:
            known = ", ".join(sorted(classes))
            raise RecipeError(f"log.report_to: unknown tracker '{name}'{did_you_mean(name, classes)}; known: {known}")
        if name not in available:
            raise RecipeError(f"log.report_to: the library of '{name}' is not installed; pip install {name}")
    return [classes[name] for name in names]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the device allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


class Metrics:
    """Collects the steps between two lines of the log, then writes one line with their means."""

    def __init__(
        self,
        *,
        append: Callable[[dict[str, Any]], None],
        trackers: Sequence[GeneralTracker],
        device: torch.device,
        num_steps: int,
        every: int,
        console: Console,
    ) -> None:
        self._append, self._trackers, self._device = append, trackers, device
        self._every, self._num_steps, self._console = every, num_steps, console
        self._window: list[StepReport] = []
        self._print_every = max(1, num_steps // LINES)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tok/s  ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def start(self, step: int) -> None:
        """Draws the bar, at `step` already done."""
        self._first, self._started = step, time.perf_counter()
        self._task = self._bar.add_task("training", total=self._num_steps, completed=step, loss=float("nan"), speed=0.0)
        self._bar.start()

    def stop(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self._bar.stop()
        for tracker in self._trackers:
            tracker.finish()

    def step(self, step: int, report: StepReport) -> None:
        """Notes a finished step; writes a line where one is due."""
        self._window.append(report)
        loss = sum(report.losses.values())
        speed = report.tokens / report.seconds
        self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        if not self._console.is_terminal and (step % self._print_every == 0 or step == self._num_steps):
            left = (self._num_steps - step) * (time.perf_counter() - self._started) / (step - self._first)
            shown = "".join(f"{name} {report.metrics[name]:.2f}  " for name in SHOWN if name in report.metrics)
            self._console.print(
                f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {loss:.4f}  {shown}"
                f"lr {report.learning_rate:.2e}  {speed:,.0f} tok/s  ETA {left:.0f} s",
            )
        if step % self._every == 0 or step == self._num_steps:
            self._write(step)

    def window(self) -> list[dict[str, Any]]:
        """The steps since the last line, as JSON values: a checkpoint keeps them, so that a resumed line is whole."""
        return [asdict(report) for report in self._window]

    def restore(self, window: Sequence[dict[str, Any]]) -> None:
        """Takes up the steps that `window` gave."""
        self._window = [StepReport(**report) for report in window]

    def note(self, step: int, values: dict[str, Any]) -> None:
        """A line of its own, e.g. of an evaluation."""
        self._append({"step": step, **values})
        self._track({k: v for k, v in values.items() if isinstance(v, (int, float))}, step)

    def _write(self, step: int) -> None:
        window, self._window = self._window, []
        done = [r for r in window if not r.skipped]
        trained = sum(r.trained_tokens for r in done)
        seconds = sum(r.seconds for r in window)
        losses = {  # weighted, so that they do not depend on how often a line is written
            name: sum(r.losses[name] * r.trained_tokens for r in done) / trained if done else math.nan
            for name in window[0].losses
        }
        names = dict.fromkeys(name for r in done for name in r.metrics)  # of a step that lacks one, it says nothing
        values: dict[str, Any] = {
            "loss": sum(losses.values()),
            **({} if len(losses) == 1 else losses),
            **{name: _mean([(r.metrics[name], r.trained_tokens) for r in done if name in r.metrics]) for name in names},
            "learning_rate": window[-1].learning_rate,
            "grad_norm": window[-1].grad_norm,
            "tokens": sum(r.tokens for r in window),
            "trained_tokens": trained,
            "tokens_per_second": sum(r.tokens for r in window) / seconds,
            "seconds": seconds,
            "memory_bytes": peak_memory_bytes(self._device),
        }
        if skipped := sum(r.skipped for r in window):
            values["skipped_steps"] = skipped
        self._append({"step": step, **values})
        self._track(values, step)

    def _track(self, values: dict[str, Any], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=step)


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    """The mean of values with weights."""
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)
