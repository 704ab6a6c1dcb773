"""The loop with a bigram model: what a step counts, what it does with a NaN, and what it says when memory runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.data.pack import weight_sum
from tuner.data.plan import Plan
from tuner.errors import NonFiniteError, OutOfMemoryError
from tuner.train import loop as module
from tuner.train.loop import MAX_SKIPS_IN_A_ROW, Loop, Progress, Signals, StepReport, evaluate_loss
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens, span

CPU = Devices(torch.device("cpu"), 0, 1)
VOCAB = 50
Samples = list[Tokens]


class Bigram(nn.Module):
    """log p(next | current) as one table; NaN where `poison` is among the ids."""

    def __init__(self, poison: int | None = None, grad_only: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(VOCAB, VOCAB))
        self.poison, self.grad_only = poison, grad_only

    def forward(self, batch: Batch) -> Tensor:
        states = self.table[batch.input_ids[batch.predict_at]]
        logps = states.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        if self.poison is not None and bool((batch.input_ids == self.poison).any()):
            if self.grad_only:
                logps.register_hook(lambda g: g * float("inf"))
            else:
                logps = logps * float("nan")
        return logps


@dataclass
class Nll:
    asked: list[int] = field(default_factory=list)
    terms: tuple[str, ...] = ("nll",)

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        self.asked.append(len(samples))
        return {"nll": sum(weight_sum(s) for s in samples)}

    def losses(
        self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> Mapping[str, Tensor]:
        return {"nll": -(policy(batch) * batch.weights).sum()}


class TwoTerms(Nll):
    """A second term with a denominator of its own: sequences instead of tokens."""

    def __init__(self) -> None:
        super().__init__(terms=("nll", "length"))

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        return super().denominators(samples) | {"length": float(len(samples))}

    def losses(
        self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]
    ) -> Mapping[str, Tensor]:
        logps = policy(batch)
        return {"nll": -(logps * batch.weights).sum(), "length": (batch.per_sequence(logps) ** 2).sum()}


def chats(answers: Sequence[int] = (1, 3, 17, 30, 2, 5)) -> Samples:
    g = torch.Generator().manual_seed(0)
    return [
        Tokens((span([0], False), span(torch.randint(1, 40, (n,), generator=g), True)), (), "rows.jsonl", row)
        for row, n in enumerate(answers)
    ]


def loop_of(samples: Samples, policy: nn.Module | None = None, stage: Any = None, **changes: Any) -> Loop:
    policy = policy or Bigram()
    options = {"batch_size": 4, "microbatch_tokens": 32, "num_epochs": 2} | changes
    settings = {k: options.pop(k) for k in ("on_nan", "max_grad_norm", "lag", "ahead") if k in options}
    optimizer = options.pop("optimizer", None)
    return Loop(
        policy=policy,
        module=policy,
        optimizer=optimizer or torch.optim.SGD(policy.parameters(), lr=99.0),
        schedule=lambda step: 0.5 / (step + 1),
        stage=stage or Nll(),
        samples=samples,
        plan=Plan([len(s) for s in samples], **options),
        devices=CPU,
        **settings,
    )


def run(loop: Loop, progress: Progress | None = None) -> tuple[Progress, list[StepReport]]:
    reports: list[StepReport] = []

    def after(_: Progress, report: StepReport) -> bool:
        reports.append(report)
        return True

    return loop.run(progress or Progress(), after), reports


def test_every_row_counts_once_an_epoch_and_the_last_batch_by_its_own_count() -> None:
    loop = loop_of(chats(), stage=(stage := Nll()))
    progress, reports = run(loop)
    assert (progress.step, loop.plan.steps_per_epoch, stage.asked) == (4, 2, [4, 2, 4, 2])
    assert progress.tokens == 2 * (58 + 6) and progress.trained_tokens == 2 * 58
    assert [r.learning_rate for r in reports] == [0.5, 0.25, 0.5 / 3, 0.125]
    assert progress.skipped_steps == 0


@pytest.mark.parametrize("stage", [Nll, TwoTerms])
def test_a_step_is_one_step_over_the_whole_batch(stage: type[Nll]) -> None:
    """Losses, gradient norm before clipping and weights equal those of the batch in one piece, in plain torch."""
    samples = chats()
    for tokens in (8, 32, 4096):
        loop = loop_of(samples, stage=stage(), microbatch_tokens=tokens, max_grad_norm=0.1)
        table = loop.policy.get_parameter("table").detach().clone().requires_grad_()
        for step in range(loop.plan.num_steps):
            logps = []
            for i in loop.plan.samples(step):
                ids = torch.as_tensor(samples[i].ids())
                logps.append(table[ids[:-1]].log_softmax(-1).gather(1, ids[1:, None])[:, 0])
            losses = {"nll": -torch.cat(logps).mean()}
            if stage is TwoTerms:
                losses["length"] = torch.stack([x.sum() ** 2 for x in logps]).mean()
            (grad,) = torch.autograd.grad(sum(losses.values()), table)  # type: ignore[arg-type]
            (report,) = loop.read([loop.step(step)])
            assert report.losses == pytest.approx({k: float(v.detach()) for k, v in losses.items()}, rel=1e-6)
            assert report.grad_norm == pytest.approx(float(grad.norm()), rel=1e-5) and grad.norm() > 0.1
            with torch.no_grad():
                table -= report.learning_rate * grad * (0.1 / (grad.norm() + 1e-6))
            torch.testing.assert_close(loop.policy.get_parameter("table").detach(), table.detach())


@pytest.mark.parametrize("grad_only", [False, True], ids=["loss", "gradient"])
def test_a_nan_stops_before_the_weights_and_names_step_and_rows(grad_only: bool) -> None:
    samples = chats()
    poisoned = replace(samples[2], trunk=(*samples[2].trunk, span([45], True)))
    samples[2] = poisoned
    loop = loop_of(samples, Bigram(poison=45, grad_only=grad_only))
    first = next(s for s in range(4) if 2 in loop.plan.samples(s))
    states: list[Tensor] = [torch.zeros(VOCAB, VOCAB)]

    def after(_: Progress, __: StepReport) -> bool:
        states.append(loop.policy.get_parameter("table").detach().clone())
        return True

    progress = Progress()
    with pytest.raises(NonFiniteError, match=rf"step {first + 1}: .*the weights are those of step {first}") as caught:
        loop.run(progress, after)
    assert "rows.jsonl line 3" in str(caught.value)
    assert ("the gradient" if grad_only else "the loss") in str(caught.value)
    table = loop.policy.get_parameter("table").detach()
    assert torch.isfinite(table).all() and torch.equal(table, states[-1]) and progress.step == first


def test_a_nan_names_the_rows_of_its_microbatch_only() -> None:
    samples = chats((4, 4, 4, 4))
    samples[1] = replace(samples[1], trunk=(*samples[1].trunk[:1], span([45, 1, 2, 3], True)))
    with pytest.raises(NonFiniteError, match=r"Rows of the step: rows.jsonl line 2\. "):
        run(loop_of(samples, Bigram(poison=45), microbatch_tokens=5))


def test_skip_counts_and_goes_on() -> None:
    samples = chats()
    samples[2] = replace(samples[2], trunk=(*samples[2].trunk, span([45], True)))
    loop = loop_of(samples, Bigram(poison=45), on_nan="skip", num_epochs=15)
    bad = [s for s in range(30) if 2 in loop.plan.samples(s)]
    progress, reports = run(loop)
    assert progress.step == 30 and progress.skipped_steps == len(bad) == 15  # more than may be skipped in a row
    assert [i for i, r in enumerate(reports) if r.skipped] == bad
    assert torch.isfinite(loop.policy.get_parameter("table")).all()
    assert loop.policy.get_parameter("table").abs().max() > 0


def test_skip_gives_up_after_a_number_in_a_row() -> None:
    samples = [replace(s, trunk=(*s.trunk, span([45], True))) for s in chats()]
    loop = loop_of(samples, Bigram(poison=45), on_nan="skip", num_epochs=20)
    progress = Progress()
    with pytest.raises(NonFiniteError, match=rf"\({MAX_SKIPS_IN_A_ROW} steps in a row\)"):
        run(loop, progress)
    assert progress.step == progress.skipped_steps == MAX_SKIPS_IN_A_ROW - 1
    assert float(loop.policy.get_parameter("table").detach().abs().max()) == 0


def test_out_of_memory_names_the_key_to_lower() -> None:
    class Greedy(Bigram):
        def forward(self, batch: Batch) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    message = (
        r"out of memory with \d+ tokens at once; lower train.microbatch_tokens.*activation_checkpointing: selective"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        run(loop_of(chats(), Greedy()))


def test_after_step_can_end_the_run() -> None:
    progress = loop_of(chats()).run(Progress(), lambda p, _: p.step < 3)
    assert progress.step == 3


def test_a_run_goes_on_from_its_progress() -> None:
    whole, parts = loop_of(chats()), loop_of(chats())
    run(whole)
    progress = parts.run(Progress(), lambda p, _: p.step < 2)
    progress, _ = run(parts, Progress(**progress.as_dict()))
    assert torch.equal(whole.policy.get_parameter("table"), parts.policy.get_parameter("table"))


# --- read late ---


def adamw(policy: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=99.0, fused=fused)


@pytest.mark.parametrize("lag", [1, 3])
def test_reports_come_late_and_whole(lag: int) -> None:
    """What is due is told at once; what is told, its losses and the weights at the end are those of reading at once."""
    seen: list[tuple[int, int]] = []
    found = []
    for late in (0, lag):
        policy = Bigram()
        loop = loop_of(chats(), policy, num_epochs=5, optimizer=adamw(policy), lag=late, ahead=late > 0)
        assert loop.lag == late
        launched: list[int] = []
        due: list[int] = []

        def after(progress: Progress, report: StepReport, launched: list[int] = launched) -> bool:
            seen.append((progress.step, launched[-1]))
            return True

        def is_due(step: int, launched: list[int] = launched, due: list[int] = due) -> bool:
            launched.append(step)
            due.append(step)
            return step in (4, 5)

        seen.clear()
        progress = loop.run(Progress(), after, is_due)
        found.append((progress, policy.table.detach().clone()))
        assert due == list(range(1, 11)) and [step for step, _ in seen] == due
        if late:
            assert [at - step for step, at in seen] == ([1, 1, 1, 0, 0, 1, 1, 1, 1, 0] if lag == 1 else LATE_BY_THREE)
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


LATE_BY_THREE = [3, 2, 1, 0, 0, 3, 3, 2, 1, 0]  # steps that are under way when each is told


def test_time_is_shared_by_the_steps_that_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 52 and 12 tokens; the device takes a second for each token, and the host none."""
    policy, clock = Bigram(), [0.0]
    loop = loop_of(chats(), policy, num_epochs=3, optimizer=adamw(policy), lag=1)
    read = module.Arriving.read
    done: dict[int, float] = {}

    def arrive(self: Any) -> Tensor:
        if id(self) not in done:
            tokens = sum(len(s) for s in (loop.samples[i] for i in loop.plan.samples(len(done))))
            done[id(self)] = (list(done.values()) or [0.0])[-1] + tokens
            kept.append(self)
        clock[0] = max(clock[0], done[id(self)])
        return read(self)

    kept: list[Any] = []
    monkeypatch.setattr(module.Arriving, "read", arrive)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    reports: list[StepReport] = []

    def after(_: Progress, report: StepReport) -> bool:
        reports.append(report)
        return True

    loop.run(Progress(), after, lambda step: step == 3)
    assert [r.tokens / r.seconds for r in reports] == pytest.approx([1.0] * 6)
    assert sum(r.seconds for r in reports) == clock[0] == sum(r.tokens for r in reports)


def test_an_optimizer_that_heeds_no_flag_is_read_at_once() -> None:
    policy = Bigram()
    assert loop_of(chats(), policy, lag=1).lag == 0  # plain SGD
    assert loop_of(chats(), policy, optimizer=adamw(policy, fused=False), lag=1).lag == 0
    assert loop_of(chats(), policy, optimizer=adamw(policy), lag=1).lag == 1


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("grad_only", [False, True], ids=["loss", "gradient"])
def test_a_nan_read_late_names_the_same(lag: int, grad_only: bool) -> None:
    samples = chats((4, 4, 4, 4, 4, 4))
    samples[1] = replace(samples[1], trunk=(*samples[1].trunk[:1], span([45, 1, 2, 3], True)))
    policy = Bigram(poison=45, grad_only=grad_only)
    loop = loop_of(samples, policy, microbatch_tokens=5, num_epochs=3, optimizer=adamw(policy), lag=lag)
    bad = next(step for step in range(6) if 1 in loop.plan.samples(step))
    progress = Progress()
    with pytest.raises(NonFiniteError) as caught:
        loop.run(progress, lambda *_: True, lambda _: False)
    assert str(caught.value).startswith(
        f"step {bad + 1}: {'the gradient (norm nan)' if grad_only else 'the loss'} is not"
    )
    assert ("Rows of the step: rows.jsonl line 2. " in str(caught.value)) is not grad_only
    assert progress.step == bad and torch.isfinite(policy.table).all()


# --- evaluation ---


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_evaluated_loss_does_not_depend_on_the_batch(size: int) -> None:
    samples, policy = chats(), Bigram().train()
    torch.manual_seed(0)
    nn.init.normal_(policy.table)
    logps = []
    for sample in samples:
        ids = torch.as_tensor(sample.ids())
        logps.append(policy.table[ids[:-1]].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    groups = [list(range(i, min(i + size, 6))) for i in range(0, 6, size)]
    values = evaluate_loss(policy, Nll(), samples, groups, CPU)
    assert values == pytest.approx({"nll": -float(torch.cat(logps).mean().detach())}, rel=1e-6)
    assert policy.training


def test_an_evaluation_gives_up_between_microbatches() -> None:
    left = [True, True, False]
    policy = Bigram().eval()
    assert evaluate_loss(policy, Nll(), chats(), [[i] for i in range(6)], CPU, lambda: left.pop(0)) is None
    assert left == [] and not policy.training


def test_ranks_give_up_an_evaluation_together() -> None:
    """One rank has its signal already and the other not yet: both must run the same collectives."""
    calls: list[str] = []

    @dataclass(frozen=True)
    class Rank(Devices):
        def sum(self, values: Tensor) -> Tensor:
            calls.append("sum")
            return values

        def agree(self, number: int) -> int:
            calls.append("agree")
            return 1  # the other rank gave up

    rank = Rank(torch.device("cpu"), 0, 2)
    for told in (True, False):
        assert evaluate_loss(Bigram(), Nll(), chats(), [[0], [1]], rank, lambda told=told: not told) is None
    assert calls == ["sum", "agree"] * 2


# --- signals ---


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from tuner.train.loop import Signals
with Signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        print("alive", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.returncode == -signal.SIGTERM and done.stdout == "alive\n"
