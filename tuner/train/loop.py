"""Samples and a stage -> optimizer steps: the one loop that every stage shares.

A step of the global batch is split into microbatches by tokens and dealt to the ranks. Each term of the loss is
divided by its denominator over the *whole* step, counted on the host before the first forward, so neither
accumulation nor the number of ranks moves the trajectory.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from tuner.data.pack import bins, pack
from tuner.data.plan import Plan
from tuner.data.report import place
from tuner.errors import NonFiniteError, OutOfMemoryError
from tuner.kernels.token_logps import reference as token_logps
from tuner.train.optim import clip
from tuner.train.setup import Devices, no_sync
from tuner.types import Batch, Tokens

MAX_SKIPS_IN_A_ROW = 10
ROW_MULTIPLE = {"cpu": token_logps.ROW_MULTIPLE, "cuda": 1}  # of the tokens of a microbatch
Sums = Mapping[str, Tensor]


class Stage(Protocol):
    """What to count and what to minimise; the loop does the rest."""

    @property
    def terms(self) -> tuple[str, ...]:
        """What is minimised; whatever else `losses` gives is a metric."""

    def denominators(self, samples: Sequence[Tokens]) -> dict[str, float]:
        """Term or metric -> what its sum is divided by, counted over the samples of a whole optimizer step.

        Terms come first.
        """

    def losses(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> Sums:
        """Term or metric -> its sum over the batch, terms with gradient; `samples` are what the batch was packed of."""


@runtime_checkable
class ScoringStage(Stage, Protocol):
    """A stage that scores each sample, and whose loss and metrics are arithmetic on the scores of all of them.

    In evaluation the scores of all held-out samples are gathered, and so may be sorted, ranked or correlated.
    """

    @property
    def whole_step(self) -> bool:
        """Whether the loss is no sum over samples: it sorts the step, or compares each sample with all of them.

        Then all samples of the step are scored without gradient first, the derivative of the loss by each score is
        worked out once, and the microbatches are run again with these coefficients. So the loss does not depend on how
        the step is divided.
        """

    def scores(self, policy: Callable[[Batch], Tensor], batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """`[samples, K]`: all that the loss knows of each sample and that has a gradient."""

    def constants(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """`[samples, C]`: what it knows besides, e.g. the reference's log-probs."""

    def whole_losses(self, scores: Tensor, constants: Tensor) -> Sums:
        """Term or metric -> its sum over samples, from their `[samples, K]` and `[samples, C]`."""

    def measures(self, scores: Tensor, constants: Tensor) -> dict[str, float]:
        """What else an evaluation reports, of all held-out samples at once: what is no sum over them."""


@runtime_checkable
class ProbingStage(ScoringStage, Protocol):
    """A stage whose loss is a sum over samples once it knows something of the whole step that has no gradient.

    That is measured on samples of its own, probes, before the first microbatch; so the step itself is run only once,
    and does not depend on how it is divided.
    """

    def probes(self, samples: Sequence[Tokens]) -> Sequence[Tokens]:
        """What to score for a step over `samples`, which alone decide it."""

    def informed(self, scores: Tensor, constants: Tensor) -> Stage:
        """The stage of this step, from `[probes, K]` and `[probes, C]`; with no probes both are empty."""


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # run through the model, branches and prompts included
    trained_tokens: float = 0.0  # sum of the weights of the predictions
    skipped_steps: int = 0  # with on_nan: skip
    best: float | None = None  # metric of the best evaluation
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    evaluated_step: int = 0  # of the last evaluation that was not cut short
    history: dict[str, Any] = field(default_factory=dict)  # what stages keep, e.g. the first evaluation

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, for logs: losses are per unit of their denominator, over all ranks."""

    losses: dict[str, float]
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # of the step, all ranks
    trained_tokens: float
    seconds: float
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)  # each by its own denominator


class Signals:
    """Notes SIGTERM and SIGINT while a run goes on; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.received:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum
        os.write(2, b"stopping after this step; a second signal ends at once\n")  # print may be in the middle of a line


@dataclass(frozen=True)
class Replay:
    """How to run a step again whose loss is known: the derivative by each score, and the sums to report."""

    coefficients: list[Tensor | None]  # of each microbatch of this rank, [samples, K]; None for an empty one
    sums: Tensor  # [names] of the whole step on the main rank, zeros on the others


def _rows(found: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(len(scores) for scores, _ in found)


def _is_whole_step(stage: Stage) -> TypeGuard[ScoringStage]:
    return isinstance(stage, ScoringStage) and stage.whole_step


@dataclass
class Loop:
    """One run's moving parts. `module` is the policy as DDP wraps it; `schedule` gives the rate of each step."""

    policy: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    stage: Stage
    samples: Sequence[Tokens]
    plan: Plan
    devices: Devices
    max_grad_norm: float = 1.0
    on_nan: str = "stop"
    skips_in_a_row: int = 0  # of steps, with on_nan: skip

    def run(self, progress: Progress, after_step: Callable[[Progress, StepReport], bool]) -> Progress:
        """Steps until the plan ends, or until `after_step` returns False."""
        while progress.step < self.plan.num_steps:
            report = self.step(progress.step)
            progress.step += 1
            progress.tokens += report.tokens
            progress.trained_tokens += 0.0 if report.skipped else report.trained_tokens
            progress.skipped_steps += report.skipped
            if not after_step(progress, report):
                break
        return progress

    def step(self, step: int) -> StepReport:
        """One optimizer step over the global batch; `step` counts from 0."""
        started = time.perf_counter()
        whole = [self.samples[i] for i in self.plan.samples(step)]
        denominators = self.stage.denominators(whole)
        mine = [[self.samples[i] for i in ids] for ids in self.plan.microbatches(step, self.devices.rank)]
        self.module.train()
        stage = inform(self.stage, self.policy, whole, self.plan.microbatch_tokens, self.devices)
        sums = self._accumulate_all(stage, mine, whole[:1], denominators)
        values = self._total(sums) / torch.tensor(list(denominators.values()), dtype=torch.float64)
        losses = dict(zip(denominators, values.tolist(), strict=True))
        norm = clip(self.policy.parameters(), self.max_grad_norm)
        finite = bool(torch.isfinite(norm)) and all(math.isfinite(losses[term]) for term in self.stage.terms)
        rate = self.schedule(step)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.skips_in_a_row = 0
        else:
            self._non_finite(step, mine, sums, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(
            losses={term: losses[term] for term in self.stage.terms},
            metrics={name: value for name, value in losses.items() if name not in self.stage.terms},
            grad_norm=float(norm),
            learning_rate=rate,
            tokens=sum(len(sample) for sample in whole),
            trained_tokens=next(iter(denominators.values())),
            seconds=time.perf_counter() - started,
            skipped=not finite,
        )

    def _accumulate_all(
        self,
        stage: Stage,
        mine: Sequence[Sequence[Tokens]],
        filler: Sequence[Tokens],
        denominators: Mapping[str, float],
    ) -> list[Tensor]:
        """Adds the gradient of every microbatch of this rank; returns the sums `[names]` of each.

        A rank with no microbatch left runs `filler` all the same, times zero, so that no collective waits for it.
        """
        replay = self._replay(stage, mine, denominators) if _is_whole_step(stage) else None
        sums = []
        for i, samples in enumerate(mine):
            with no_sync(self.module, last=i == len(mine) - 1):
                coefficients = replay.coefficients[i] if replay and samples else None
                given = samples or filler
                sums.append(self._accumulate(stage, given, denominators, coefficients, weightless=not samples))
        return [replay.sums] if replay else sums

    def _accumulate(
        self,
        stage: Stage,
        samples: Sequence[Tokens],
        denominators: Mapping[str, float],
        coefficients: Tensor | None,
        *,
        weightless: bool,
    ) -> Tensor:
        """Adds the gradient of one microbatch; returns its sums in the order of `denominators`."""
        batch = self._batch(samples)
        with _memory_for(batch):
            if _is_whole_step(stage):
                scores = stage.scores(self.module, batch, samples)
                loss = (scores * (torch.zeros_like(scores) if coefficients is None else coefficients)).sum()
                values = torch.zeros(len(denominators), dtype=torch.float64)
            else:
                sums = stage.losses(self.module, batch, samples)
                loss = torch.stack([sums[name] / denominators[name] for name in stage.terms]).sum()
                values = torch.stack([sums[name].detach() for name in denominators]).double()
            loss = loss * self.devices.world_size  # DDP averages over ranks
            (loss * 0.0 if weightless else loss).backward()
        return values * 0.0 if weightless else values

    def _replay(
        self, stage: ScoringStage, mine: Sequence[Sequence[Tokens]], denominators: Mapping[str, float]
    ) -> Replay:
        """Scores the whole step, over all ranks, and differentiates the loss by the scores."""
        with torch.no_grad():
            batches = [(self._batch(samples), samples) for samples in mine if samples]
            found = [(stage.scores(self.policy, *pair), stage.constants(*pair)) for pair in batches]
        everyone = self.devices.gather([(s.cpu(), c.cpu()) for s, c in found])
        flat = [pair for rank in everyone for pair in rank]
        scores = torch.cat([s for s, _ in flat]).requires_grad_()
        sums = stage.whole_losses(scores, torch.cat([c for _, c in flat]))
        loss = torch.stack([sums[name] / denominators[name] for name in stage.terms]).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        before = sum(len(s) for rank in everyone[: self.devices.rank] for s, _ in rank)
        own = iter(gradient[before:].split([len(s) for s, _ in found] + [len(scores) - before - _rows(found)]))
        coefficients = [next(own).to(self.devices.device) if samples else None for samples in mine]
        values = torch.stack([sums[name].detach() for name in denominators]).double()
        return Replay(coefficients, values if self.devices.rank == 0 else values * 0.0)

    def _batch(self, samples: Sequence[Tokens]) -> Batch:
        return pack(samples, ROW_MULTIPLE[self.devices.device.type]).to(self.devices.device)

    def _total(self, sums: Sequence[Tensor]) -> Tensor:
        return self.devices.sum(torch.stack(list(sums)).sum(0)).cpu()

    def _non_finite(self, step: int, mine: Sequence[Sequence[Tokens]], sums: Sequence[Tensor], norm: Tensor) -> None:
        """Names the step and the rows; raises unless `on_nan: skip` still has patience."""
        suspects = [samples for samples, s in zip(mine, sums, strict=True) if not torch.isfinite(s).all()] or mine
        rows = [place(sample.source, sample.row) for samples in suspects for sample in samples]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        what = "the loss" if suspects is not mine else f"the gradient (norm {float(norm)})"
        self.skips_in_a_row += 1
        if self.on_nan == "stop" or self.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            shown = shown or "those of another rank"
            tail = f" ({self.skips_in_a_row} steps in a row)" if self.on_nan == "skip" else ""
            raise NonFiniteError(
                f"step {step + 1}: {what} is not finite{tail}; the weights are those of step {step}. Rows of the step: "
                f"{shown}. Lower train.learning_rate, or look at these rows"
            )


@contextmanager
def _memory_for(batch: Batch) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"out of memory with {batch.num_tokens:,} tokens at once; lower train.microbatch_tokens below that, or "
            "set train.activation_checkpointing: true (neither changes the result)"
        ) from None


def inform(stage: Stage, policy: nn.Module, samples: Sequence[Tokens], capacity: int, devices: Devices) -> Stage:
    """The stage as it is for a step over `samples`: over all ranks its probes are scored, `capacity` tokens at once."""
    if not isinstance(stage, ProbingStage):
        return stage
    probes = stage.probes(samples)
    table: list[tuple[Sequence[int], Tensor, Tensor]] = []
    for ids in bins([len(probe) for probe in probes], capacity)[devices.rank :: devices.world_size]:
        chosen = [probes[i] for i in ids]
        batch = pack(chosen, ROW_MULTIPLE[devices.device.type]).to(devices.device)
        with torch.no_grad(), _memory_for(batch):
            table.append((ids, stage.scores(policy, batch, chosen).cpu(), stage.constants(batch, chosen).cpu()))
    everyone = [part for rank in devices.gather(table) for part in rank]
    return stage.informed(*(_in_order(everyone) if everyone else (torch.empty(0, 0), torch.empty(0, 0))))


def evaluate_loss(
    policy: nn.Module,
    stage: Stage,
    samples: Sequence[Tokens],
    microbatches: Sequence[Sequence[int]],
    devices: Devices,
    keep_going: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """Each term and metric over all samples, and the measures of the stage.

    Sums over sums, so that no value depends on how the samples are batched. None if `keep_going` said no between two
    microbatches, on any rank: the ranks give up together.
    """
    denominators = stage.denominators(samples)
    total = torch.zeros(len(denominators), dtype=torch.float64, device=devices.device)
    table: list[tuple[Sequence[int], Tensor, Tensor]] = []  # of a stage that scores: samples, scores, constants
    given_up = False
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            capacity = max(sum(len(samples[i]) for i in ids) for ids in microbatches)
            stage = inform(stage, policy, samples, capacity, devices)
            for ids in microbatches[devices.rank :: devices.world_size]:
                if given_up := not keep_going():
                    break
                chosen = [samples[i] for i in ids]
                batch = pack(chosen, ROW_MULTIPLE[devices.device.type]).to(devices.device)
                if isinstance(stage, ScoringStage):
                    table.append((ids, stage.scores(policy, batch, chosen).cpu(), stage.constants(batch, chosen).cpu()))
                else:
                    sums = stage.losses(policy, batch, chosen)
                    total += torch.stack([sums[name] for name in denominators]).double()
    finally:
        policy.train(was_training)
    devices.sum(total)
    if devices.agree(int(given_up)):
        return None
    measures: dict[str, float] = {}
    if isinstance(stage, ScoringStage):
        scores, constants = _in_order([part for rank in devices.gather(table) for part in rank])
        sums = stage.whole_losses(scores, constants)
        total = torch.stack([sums[name] for name in denominators]).double()
        measures = stage.measures(scores, constants)
    values = dict(zip(denominators, total.tolist(), strict=True))
    return {name: value / denominators[name] for name, value in values.items()} | measures


def _in_order(table: Sequence[tuple[Sequence[int], Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scores and constants of all samples, in the order of the samples."""
    order = torch.tensor([i for ids, _, _ in table for i in ids]).argsort()
    return torch.cat([scores for _, scores, _ in table])[order], torch.cat([given for _, _, given in table])[order]
