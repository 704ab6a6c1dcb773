"""Invariant 7: a NaN stops the run before it reaches the weights, and nothing on disk holds one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner import recipe as recipes
from tuner.errors import NonFiniteError
from tuner.stages import sft
from tuner.train.loop import Loop
from tuner.train.session import Session
from tuner.types import Batch, Tokens

BAD_ROW = 5  # of the file, from 0


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions that runs start, so that a test can look at their weights."""
    found: list[Session] = []
    prepare = Session.__post_init__

    def noted(self: Session) -> None:
        prepare(self)
        found.append(self)

    monkeypatch.setattr(Session, "__post_init__", noted)
    return found


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the loss of one row NaN after as many of its visits as the list says."""
    left = [1]
    original = sft.SFT.losses

    def losses(
        self: sft.SFT, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> dict[str, Tensor]:
        sums = original(self, policy, batch, samples)
        if any(row == BAD_ROW for _, row in batch.rows):
            left[0] -= 1
            return {k: v * float("nan") for k, v in sums.items()} if left[0] < 0 else sums
        return sums

    monkeypatch.setattr(sft.SFT, "losses", losses)
    return left


def check(recipe_file: Path, output: Path, sessions: list[Session]) -> None:
    """The second visit of the row ends the run: in the second epoch of three steps."""
    recipe = recipes.load(recipe_file, [f"train.output_dir={output}", "train.max_steps=9", "log.save_steps=1"])
    with pytest.raises(NonFiniteError, match=r"step (4|5|6): the loss is not finite; the weights are those") as caught:
        sft.run(recipe)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert f"chats.jsonl line {BAD_ROW + 1}" in str(caught.value)
    assert caught.value.exit_code == 1
    saved = output / "checkpoints" / f"step-{step - 1:06d}"
    weights = load_file(saved / "weights.safetensors")
    for name, parameter in sessions[-1].trainable().items():
        assert torch.equal(parameter.detach(), weights[name]), name
    for file in output.rglob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values() if t.is_floating_point()), file
    assert json.loads((output / "manifest.json").read_text())["status"] == "failed"
    assert not (output / "adapter").exists()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, step))


def test_a_nan_stops_before_the_weights(
    recipe_file: Path, tmp_path: Path, session: list[Session], poison: list[int]
) -> None:
    check(recipe_file, tmp_path / "run", session)
    poison[0] = 1000  # the row is mended: the run goes on from the last step that was done
    summary = sft.run(
        recipes.load(recipe_file, [f"train.output_dir={tmp_path}/run", "train.max_steps=9", "log.save_steps=1"]),
        resume=True,
    )
    assert summary["steps"] == 9


def test_skip_leaves_the_step_out_and_says_so(recipe_file: Path, tmp_path: Path, poison: list[int]) -> None:
    recipe = recipes.load(
        recipe_file, [f"train.output_dir={tmp_path}/run", "train.max_steps=9", "train.on_nan=skip"]
    )  # fmt: skip
    summary = sft.run(recipe)
    assert summary["skipped_steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("skipped_steps")] and len(rows) == 9
    assert [row["loss"] is None for row in rows] == [bool(row.get("skipped_steps")) for row in rows]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_mutant_nothing_is_checked(
    recipe_file: Path, tmp_path: Path, session: list[Session], poison: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "_is_finite", lambda *_: True)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(recipe_file, tmp_path / "run", session)
