"""Invariant 6: a run that was interrupted anywhere and resumed is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner import recipe as recipes
from tuner.errors import Interrupted
from tuner.stages import sft
from tuner.train import session
from tuner.train.loop import Loop

STEPS = 12  # four epochs of three
WALL_CLOCK = ("seconds", "tokens_per_second", "memory_bytes")
OVERRIDES = [
    f"train.max_steps={STEPS}",
    "train.microbatch_tokens=300",
    "train.weight_decay=0.01",
    "data.eval=0.15",
    "eval.steps=4",
    "log.logging_steps=5",  # so that most cuts fall between two lines of the log
]
DROPOUT = ["adapter.lora_dropout=0.2"]


def run(recipe_file: Path, output: Path, *, resume: bool = False, extra: Sequence[str] = DROPOUT) -> dict[str, Any]:
    recipe = recipes.load(recipe_file, [*OVERRIDES, f"train.output_dir={output}", *extra])
    return sft.run(recipe, resume=resume)


class Cut:
    """Sends this process SIGTERM before a chosen microbatch of a chosen step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: tuple[int, int] | None = None  # (step, microbatch), both from 0
        self._now = (0, -1)
        step, accumulate = Loop.step, Loop._accumulate

        def stepped(loop: Loop, number: int) -> Any:
            self._now = (number, -1)
            return step(loop, number)

        def accumulated(loop: Loop, *args: Any) -> Tensor:
            self._now = (self._now[0], self._now[1] + 1)
            if self._now == self.at:
                signal.raise_signal(signal.SIGTERM)
            return accumulate(loop, *args)

        monkeypatch.setattr(Loop, "step", stepped)
        monkeypatch.setattr(Loop, "_accumulate", accumulated)

    def stop(self, recipe_file: Path, output: Path, step: int, microbatch: int = 0, **options: Any) -> None:
        """Runs until step `step` (1-based) is done: its checkpoint is what is published."""
        self.at = (step - 1, microbatch)
        with pytest.raises(
            Interrupted, match=rf"step {step} of {STEPS} is saved in .*; continue with --resume"
        ) as caught:
            run(recipe_file, output, **options)
        assert caught.value.exit_code == 143
        self.at = None
        assert f"step-{step:06d}" in [p.name for p in (output / "checkpoints").iterdir()]
        assert not (output / "adapter").exists()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return Cut(monkeypatch)


@pytest.fixture
def whole(recipe_file: Path, tmp_path: Path) -> Path:
    run(recipe_file, tmp_path / "whole")
    return tmp_path / "whole"


def state(output: Path) -> dict[str, Any]:
    last = output / "checkpoints" / f"step-{STEPS:06d}"
    tensors = {
        f"{file.stem}.{name}": tensor
        for file in [*last.glob("*.safetensors"), output / "adapter" / "adapter_model.safetensors"]
        for name, tensor in load_file(file).items()
    }
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    saved = json.loads((last / "state.json").read_text())
    window = saved["progress"]["history"].pop("window")
    return {
        "tensors": tensors,
        "metrics": [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows],
        "window": [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in window],
        "state": saved,
        "summary": json.loads((output / "manifest.json").read_text())["summary"],
    }


def assert_same(output: Path, whole: Path) -> None:
    mine, wanted = state(output), state(whole)
    tensors, others = mine.pop("tensors"), wanted.pop("tensors")
    assert mine == wanted
    assert tensors.keys() == others.keys()
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, other in others.items():
        assert torch.equal(tensors[name], other), name


# The plan has at least two microbatches a step; step 3 ends the first epoch, step 4 has an evaluation.
CUTS = {"first": (1, 0), "inside a window": (2, 1), "an epoch": (3, 0), "an evaluation": (4, 0), "middle": (7, 1)}


@pytest.mark.parametrize("at", [*CUTS.values(), (STEPS - 1, 0)], ids=[*CUTS, "last but one"])
def test_a_resumed_run_is_the_uninterrupted_one(
    recipe_file: Path, tmp_path: Path, whole: Path, cut: Cut, at: tuple[int, int]
) -> None:
    cut.stop(recipe_file, tmp_path / "cut", *at)
    run(recipe_file, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole)


def test_resumed_twice(recipe_file: Path, tmp_path: Path, whole: Path, cut: Cut) -> None:
    cut.stop(recipe_file, tmp_path / "cut", 3)
    cut.stop(recipe_file, tmp_path / "cut", 8, 1, resume=True)
    run(recipe_file, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole)


def test_an_evaluation_that_was_cut_short_is_made_up_for(
    recipe_file: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = session.evaluate_loss

    def stopped(policy: Any, stage: Any, samples: Any, microbatches: Any, devices: Any, keep_going: Any) -> Any:
        if started:
            signal.raise_signal(signal.SIGTERM)
        started.append(True)
        return evaluate(policy, stage, samples, microbatches, devices, keep_going)

    started: list[bool] = []
    monkeypatch.setattr(session, "evaluate_loss", stopped)
    with pytest.raises(Interrupted, match="step 4 of 12 is saved"):
        run(recipe_file, tmp_path / "cut")
    monkeypatch.setattr(session, "evaluate_loss", evaluate)
    run(recipe_file, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole)


def test_a_crash_goes_back_to_the_last_checkpoint(
    recipe_file: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.step

    def crash(loop: Loop, number: int) -> Any:
        if number == 7:
            raise RuntimeError("the power went")
        return step(loop, number)

    monkeypatch.setattr(Loop, "step", crash)
    with pytest.raises(RuntimeError, match="the power went"):
        run(recipe_file, tmp_path / "cut")
    monkeypatch.setattr(Loop, "step", step)
    run(recipe_file, tmp_path / "cut", resume=True)  # from step 6; the line of step 5 stays, none is doubled
    assert_same(tmp_path / "cut", whole)


OTHERS = {
    "full": ["adapter=null"],
    "checkpointed": ["adapter.lora_dropout=0.2", "train.activation_checkpointing=true"],
    "pissa": ["adapter.lora_dropout=0.2", "adapter.init_lora_weights=pissa_niter_4"],
    "qlora": ["adapter.lora_dropout=0.2", "model.load_in_4bit=true"],
}


@pytest.mark.parametrize("extra", OTHERS.values(), ids=OTHERS)
def test_other_ways_to_train(recipe_file: Path, tmp_path: Path, cut: Cut, extra: list[str]) -> None:
    run(recipe_file, tmp_path / "whole", extra=extra)
    cut.stop(recipe_file, tmp_path / "cut", 5, 1, extra=extra)
    run(recipe_file, tmp_path / "cut", extra=extra, resume=True)
    results = [next((tmp_path / n).glob("*/*model.safetensors")).read_bytes() for n in ("whole", "cut")]
    assert results[0] == results[1]


# --- mutants: parts of the state that a resume forgets ---


@pytest.mark.parametrize("forgotten", ["rng", "optimizer", "window"])
def test_mutants(
    recipe_file: Path, tmp_path: Path, whole: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    cut.stop(recipe_file, tmp_path / "cut", 3)
    if forgotten == "rng":
        monkeypatch.setattr(session, "set_rng_state", lambda *_: None)
    elif forgotten == "optimizer":
        monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *_: None)
    else:
        monkeypatch.setattr(session.Metrics, "restore", lambda *_: None)
    run(recipe_file, tmp_path / "cut", resume=True)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "cut", whole)
