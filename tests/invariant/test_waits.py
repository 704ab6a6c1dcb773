"""No step waits for the device; and steps that are read late are, bit for bit, those that are read at once.

A CPU has nothing to wait for, so these runs take the way of a GPU on one: what a step measures is read while the next
one runs, data is prepared in the background, and every operation that would make a GPU wait is refused.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from tests.conftest import SENTENCES
from tests.invariant.test_answers import random_rows
from tuner import recipe as recipes
from tuner.errors import Interrupted, NonFiniteError
from tuner.losses import preference
from tuner.model.policy import Policy
from tuner.stages import dpo, reward, sft
from tuner.stages.judged import ProbingJudged
from tuner.stages.pairs import DPO
from tuner.train import loop as module
from tuner.train import session
from tuner.train.loop import Loop, Taken, evaluate_loss
from tuner.train.optim import Guard
from tuner.train.session import Session
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens

WALL_CLOCK = ("seconds", "tokens_per_second", "memory_bytes")
# What only the device knows and the host asks for.
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
}
COPIES = (torch.tensor, torch.as_tensor, Tensor.cpu, Tensor.numpy, Tensor.tolist)  # which wait until they are done


class NoCopies(TorchFunctionMode):
    """Refuses the copies that wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in COPIES, f"a GPU would wait: {func.__name__}"
        return func(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """Refuses every operation, of forward and backward, whose result or its size the host asks the device for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert name not in WAITS and not masks, f"a GPU would wait: {name}"
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, watched: bool = True) -> Iterator[list[int]]:
    """Runs in here go the way of a GPU; the numbers of their steps are noted, as they are given to the device."""
    steps: list[int] = []
    step = Loop.step

    def watch(loop: Loop, number: int) -> Taken:
        steps.append(number)
        assert loop.lag == 1 and loop.ahead
        if not watched:
            return step(loop, number)
        with NoCopies(), NoWaits():
            return step(loop, number)

    with monkeypatch.context() as patch:
        patch.setitem(session.LAG, "cpu", 1)
        patch.setattr(Loop, "step", watch)
        yield steps


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(" ".join(SENTENCES).split(), count))


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "pairs": lambda i: {"prompt": words(1 + i % 7, i), "chosen": words(1 + i % 9, i + 1), "rejected": words(3, i + 2)},
    "labels": lambda i: {"prompt": words(1 + i % 5, i % 6), "completion": words(1 + i % 9, i), "label": i % 3 != 1},
    "lists": lambda i: {"prompt": words(2, i), "completions": [words(1 + k, i + k) for k in range(2 + i % 3)]},
    "margins": lambda i: {
        "prompt": words(2, i),
        "chosen": words(3, i),
        "rejected": words(2, 99 - i),
        "margin": 1 + i % 3,
    },
}
# Name -> stage, rows and overrides
RUNS: dict[str, tuple[Any, str, list[str]]] = {
    "sft": (sft, "chats", []),
    "sft full": (sft, "chats", ["adapter=null"]),
    "dpo": (dpo, "pairs", []),
    "dpo kept": (dpo, "pairs", ["reference={cache: true}"]),
    "dpo margins": (dpo, "margins", ["loss={type: sigmoid, margin_weight: 0.1}"]),
    "aot": (dpo, "pairs", ["loss={type: aot}"]),
    "kto": (dpo, "labels", ["loss={type: kto}"]),
    "reward": (reward, "lists", []),
    "reward margins": (reward, "margins", ["loss={type: bradley_terry, margin_weight: 1.0, centring: 0.01}"]),
}


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """`run(name, folder, *overrides)` trains in several microbatches a step, and gives the run directory."""

    def train(name: str, folder: str, *overrides: str, steps: int = 5, resume: bool = False) -> Path:
        stage, rows, own = RUNS[name]
        data = tmp_path / f"{rows}.jsonl"
        if not data.exists():
            data.write_text("".join(json.dumps(ROWS[rows](i)) + "\n" for i in range(20)))
        common = [f"train.output_dir={tmp_path}/{folder}", f"train.max_steps={steps}", "train.microbatch_tokens=150"]
        given = [f"data.train={data}", *common, *own, *overrides]
        stage.run(recipes.load(recipe_file, given, stage=stage.__name__.rpartition(".")[2]), resume=resume)
        return tmp_path / folder

    return train


def result(output: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and optimizer state of the last checkpoint, and the lines of the log."""
    last = max((output / "checkpoints").iterdir())
    tensors = {f"{f.stem}.{k}": t for f in last.glob("[ow]*.safetensors") for k, t in load_file(f).items()}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    (tensors, rows), (others, wanted) = result(one), result(other)
    assert rows == wanted
    assert tensors.keys() == others.keys() and any(name.startswith("optimizer.") for name in tensors)
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_and_the_result_is_the_same(
    name: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_on_a_gpu(monkeypatch) as steps:
        late = run(name, "late")
    assert steps == [0, 1, 2, 3, 4]
    assert_same(late, run(name, "at-once"))


def test_dropout_draws_the_same(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that prepares draws no random numbers."""
    with as_on_a_gpu(monkeypatch):
        late = run("sft", "late", "adapter.lora_dropout=0.2")
    assert_same(late, run("sft", "at-once", "adapter.lora_dropout=0.2"))


PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "list": lambda x: x.sum().tolist(),
    "tensor of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy": lambda x: x.cpu(),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_mutants_that_wait(
    planted: Callable[[Tensor], Any], run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Policy.forward

    def waiting(self: Policy, batch: Batch, **options: Any) -> Tensor:
        logps = forward(self, batch, **options)
        planted(logps.detach())
        return logps

    monkeypatch.setattr(Policy, "forward", waiting)
    with as_on_a_gpu(monkeypatch), pytest.raises(AssertionError, match="a GPU would wait"):
        run("sft", "mutant")


# --- what is not finite ---


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What trains in each session that a run makes, at its end."""
    found: list[dict[str, Tensor]] = []
    train = Session.train

    def noted(self: Session, checkpoint: Any) -> Any:
        try:
            return train(self, checkpoint)
        finally:
            found.append({name: p.detach().clone() for name, p in self.trainable().items()})

    monkeypatch.setattr(Session, "train", noted)
    return found


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch, bad: Sequence[int]) -> Iterator[None]:
    """Makes the loss of row 5 NaN at those of its visits that `bad` numbers from 0: one an epoch of three steps."""
    losses, visits = sft.SFT.losses, [-1]

    def nan(
        self: sft.SFT, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> dict[str, Tensor]:
        sums = losses(self, policy, batch, samples)
        if not any(row == 5 for _, row in batch.rows):
            return sums
        visits[0] += 1
        return {k: v * float("nan") for k, v in sums.items()} if visits[0] in bad else sums

    with monkeypatch.context() as patch:
        patch.setattr(sft.SFT, "losses", nan)
        yield


def stopped(run: Callable[..., Path], folder: str, *overrides: str) -> str:
    with pytest.raises(NonFiniteError) as caught:
        run("sft", folder, *overrides, steps=9)
    return str(caught.value)


EACH, NEVER = "log.save_steps=1", "log.save_steps=100"  # with a checkpoint every step each is read before the next


def stop_in_both_ways(
    saves: str, run: Callable[..., Path], weights: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned(monkeypatch, [1]):
        said = stopped(run, "at-once", saves)
    with poisoned(monkeypatch, [1]), as_on_a_gpu(monkeypatch) as steps:
        assert stopped(run, "late", saves) == said
    bad = int(said.removeprefix("step ").split(":")[0])
    assert 4 <= bad <= 6 and f"the weights are those of step {bad - 1}." in said and "chats.jsonl line 6" in said
    assert len(steps) == bad + (saves == NEVER), "the step after it was under way when it was read"
    one, other = weights
    for name in one:
        assert torch.equal(one[name], other[name]) and one[name].isfinite().all(), name


@pytest.mark.parametrize("saves", [EACH, NEVER], ids=["at once", "late"])
def test_a_nan_stops_in_the_same_way(
    saves: str, run: Callable[..., Path], weights: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_both_ways(saves, run, weights, monkeypatch)


@pytest.mark.parametrize("forgotten", ["the step", "those after it"])
def test_mutants_of_the_guard(
    forgotten: str, run: Callable[..., Path], weights: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that is never set lets the NaN in; one that is not kept lets the next step in."""

    def hold(self: Guard, finite: Tensor) -> None:
        of_step = torch.zeros(()) if forgotten == "the step" else (~finite).float()
        self._optimizer.found_inf = of_step  # type: ignore[attr-defined]

    monkeypatch.setattr(Guard, "hold", hold)
    with pytest.raises(AssertionError):
        stop_in_both_ways(NEVER, run, weights, monkeypatch)


def test_skipped_steps_are_skipped_in_the_same_way(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for folder in ("at-once", "late"):
        with poisoned(monkeypatch, [0, 2]), ExitStack() as stack:
            if folder == "late":
                stack.enter_context(as_on_a_gpu(monkeypatch))
            outputs.append(run("sft", folder, "train.on_nan=skip", NEVER, steps=9))
    assert_same(*outputs)
    assert sum(row.get("skipped_steps", 0) for row in result(outputs[1])[1]) == 2


def test_too_many_in_a_row_stop_in_the_same_way(
    run: Callable[..., Path], weights: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after them, which is under way by then and finite, is left out."""
    monkeypatch.setattr(module, "MAX_SKIPS_IN_A_ROW", 2)
    given = ("train.on_nan=skip", "train.batch_size=22")  # one step an epoch, so every step has the row
    said = []
    for folder in ("at-once", "late"):
        with ExitStack() as stack:
            if folder == "late":
                stack.enter_context(as_on_a_gpu(monkeypatch))
            with poisoned(monkeypatch, [2, 3]):
                said.append(stopped(run, folder, NEVER, *given))
    assert said[0] == said[1] and "step 4: the loss is not finite (2 steps in a row)" in said[0]
    one, other = weights
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_a_nan_in_a_loss_over_the_whole_step_names_its_rows(
    late: bool, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = DPO.scores

    def nan(self: DPO, policy: Any, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        bad = any(row == 5 for _, row in batch.rows)
        return scores(self, policy, batch, samples) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(DPO, "scores", nan)
    with ExitStack() as stack:
        if late:
            stack.enter_context(as_on_a_gpu(monkeypatch))
        with pytest.raises(NonFiniteError, match=r"step [123]: the loss is not finite; .*pairs.jsonl line \d"):
            run("aot", "run")


# --- signals, checkpoints, early stops ---


def test_a_signal_stops_after_the_step_and_a_resumed_run_is_whole(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("log.save_steps=4", "log.logging_steps=3", "adapter.lora_dropout=0.1")
    whole = run("sft", "whole", *common, steps=9)
    forward, calls = Policy.forward, [0]

    def told(self: Policy, batch: Batch, **options: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 12:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, **options)

    with as_on_a_gpu(monkeypatch) as steps:
        with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
            patch.setattr(Policy, "forward", told)
            run("sft", "cut", *common, steps=9)
        at = steps[-1] + 1
        assert f"step {at} of 9 is saved" in str(caught.value) and at not in (4, 8)
        assert not [t for t in threading.enumerate() if t.name.startswith("tuner-ahead")]
        run("sft", "cut", *common, steps=9, resume=True)
    assert_same(whole.parent / "cut", whole)


def test_evaluations_and_early_stops_see_the_weights_of_their_step(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third evaluation is said to be a bad one."""
    evaluate, calls = session.evaluate_loss, [0]

    def worse(*args: Any) -> Any:
        calls[0] += 1
        return {name: value + 10 * (calls[0] == 3) for name, value in (evaluate(*args) or {}).items()}

    monkeypatch.setattr(session, "evaluate_loss", worse)
    given = ("data.eval=0.2", "eval.steps=3", "eval.early_stopping_patience=1", "eval.load_best=true", NEVER)
    with as_on_a_gpu(monkeypatch) as steps:
        late = run("sft", "late", *given, steps=12)
    assert steps == [0, 1, 2, 3, 4, 5]
    calls[0] = 0
    assert_same(late, run("sft", "at-once", *given, steps=12))


def test_mutant_a_loop_that_is_not_told_what_is_due(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    due = Session._due

    def silent(self: Session, step: int) -> bool:
        due(self, step)
        return False

    with as_on_a_gpu(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(Session, "_due", silent)
        late = run("sft", "late", "log.save_steps=2")
    wanted = run("sft", "at-once", "log.save_steps=2")
    with pytest.raises(AssertionError):
        assert_same(late, wanted)
        assert [p.name for p in (late / "checkpoints").iterdir()] == [
            p.name for p in (wanted / "checkpoints").iterdir()
        ]


# --- an evaluation, which may wait ---


class OnDevice(Tensor):
    """Stands for a tensor of a GPU: what is made of it lies there too, until it is fetched by `cpu`."""

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_an_evaluation_reads_on_the_host_what_probes_tell(make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Its tables are there, and torch takes no scalar of a GPU beside tensors of the host."""
    samples, policy = random_rows(9), Policy(make_model(), compute_dtype=torch.float32)
    places: list[tuple[type, ...]] = []

    class Watched(ProbingJudged):
        def scores(self, *args: Any) -> Tensor:
            return super().scores(*args).as_subclass(OnDevice)

        def constants(self, *args: Any) -> Tensor:
            return super().constants(*args).as_subclass(OnDevice)

        def whole_losses(self, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
            assert self.mismatched is not None
            places.append(tuple(map(type, (scores, constants, self.mismatched.ratio))))
            return super().whole_losses(scores, constants)

    stage = Watched(preference.resolve("kto", {}), lambda batch, _: torch.zeros(batch.num_predictions))
    assert evaluate_loss(policy, stage, samples, [[0, 1, 2, 3], [4, 5, 6, 7, 8]], Devices(torch.device("cpu"), 0, 1))
    assert places == [(Tensor, Tensor, Tensor)]
