"""Invariant 4: how a step is cut into microbatches and dealt to ranks does not move the trajectory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tuner import recipe as recipes
from tuner.stages import sft
from tuner.train.loop import Loop, Microbatch
from tuner.train.stage import Stage
from tuner.types import Batch, Tokens

STEPS = 20  # Adam magnifies rounding where a gradient is near 0, up to the learning rate: 1e-4 here
REPOSITORY = Path(__file__).resolve().parents[2]
Result = dict[str, Tensor]
KINDS = {"lora": ["adapter.init_lora_weights=gaussian"], "full": ["adapter=null"]}
# one row of all 8 chats, two or three rows, and each chat alone
SPLITS = {
    "8 at once": ["train.microbatch_tokens=100000"],
    "4+4": ["train.microbatch_tokens=350"],
    "8x1": ["data.packing=false"],
}


def overrides(kind: str, split: str, output: Path) -> list[str]:
    common = [f"train.output_dir={output}", f"train.max_steps={STEPS}", "train.learning_rate=1e-4"]
    return [*common, *KINDS[kind], *SPLITS[split]]


def result(output: Path) -> Result:
    (file,) = [*output.glob("adapter/adapter_model.safetensors"), *output.glob("model/model.safetensors")]
    return load_file(file)


def train(recipe_file: Path, kind: str, split: str, output: Path) -> Result:
    sft.run(recipes.load(recipe_file, overrides(kind, split, output)))
    return result(output)


def assert_same(a: Result, b: Result) -> None:
    assert a.keys() == b.keys()
    worst = {name: float((a[name] - b[name]).abs().max()) for name in a}
    name = max(worst, key=worst.__getitem__)
    assert worst[name] <= 1e-6, f"{name}: {worst[name]:.2e}"


@pytest.fixture
def whole(recipe_file: Path, tmp_path: Path) -> Callable[[str], Result]:
    return lambda kind: train(recipe_file, kind, "8 at once", tmp_path / f"whole-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches(
    recipe_file: Path, tmp_path: Path, whole: Callable[[str], Result], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    accumulate = Loop._accumulate

    def counted(loop: Loop, stage: Stage, part: Microbatch, *args: Any) -> Tensor:
        sizes.append(len(part.samples))
        return accumulate(loop, stage, part, *args)

    monkeypatch.setattr(Loop, "_accumulate", counted)
    together = whole(kind)
    assert set(sizes) == {8, 6}
    for split in ("4+4", "8x1"):
        sizes.clear()
        assert_same(train(recipe_file, kind, split, tmp_path / split), together)
        assert set(sizes) == {1} if split == "8x1" else 2 * STEPS <= len(sizes) <= 4 * STEPS


def launch(recipe_file: Path, kind: str, split: str, output: Path, *extra: str) -> subprocess.Popen[str]:
    """Two gloo processes on this machine, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tuner", "sft", str(recipe_file), *overrides(kind, split, output), *extra]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(recipe_file: Path, tmp_path: Path, whole: Callable[[str], Result], kind: str) -> None:
    """Rows of one chat are dealt evenly; of one row with all chats, the second rank gets nothing but a filler.

    What the layers make again in the backward makes no difference.
    """
    split = "8x1" if kind == "full" else "8 at once"
    process = launch(recipe_file, kind, split, tmp_path / "two", "train.activation_checkpointing=selective")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count(f"step {STEPS}/{STEPS}") == 1, "the main rank alone speaks"
    assert_same(result(tmp_path / "two"), whole(kind))


def test_mutant_a_mean_of_means(
    recipe_file: Path, tmp_path: Path, whole: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = whole("lora")
    original = sft.SFT.losses

    def denominators(self: sft.SFT, samples: Sequence[Tokens]) -> dict[str, float]:
        return {"nll": 1.0}

    def losses(
        self: sft.SFT, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> dict[str, Tensor]:
        return {"nll": original(self, policy, batch, samples)["nll"] / batch.weight_sum}

    monkeypatch.setattr(sft.SFT, "denominators", denominators)
    monkeypatch.setattr(sft.SFT, "losses", losses)
    assert_same(train(recipe_file, "lora", "8 at once", tmp_path / "one"), together)
    with pytest.raises(AssertionError):
        assert_same(train(recipe_file, "lora", "8x1", tmp_path / "eight"), together)
