"""Samples and a stage -> optimizer steps: the one loop that every stage shares.

A step of the global batch is split into microbatches by tokens and dealt to the ranks. Each term of the loss is
divided by its denominator over the *whole* step, counted on the host before the first forward, so neither
accumulation nor the number of ranks moves the trajectory.

On a GPU no step waits for the device. Its data was brought there while the step before it ran, what it measures is read
while the next one runs, and whether it is finite is decided where it is known: the optimizer is handed a flag.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner.data.pack import bins, pack
from tuner.data.plan import Plan
from tuner.data.report import place
from tuner.errors import NonFiniteError, OutOfMemoryError
from tuner.kernels.token_logps import reference as token_logps
from tuner.train.optim import Guard, clip, heeds_flags
from tuner.train.overlap import Ahead, Arriving
from tuner.train.setup import Devices, no_sync
from tuner.train.stage import MeasuringStage, ProbingStage, ScoringStage, Stage, is_whole_step
from tuner.types import Batch, Tokens, on_device

MAX_SKIPS_IN_A_ROW = 10
ROW_MULTIPLE = {"cpu": token_logps.ROW_MULTIPLE, "cuda": 1}  # of the tokens of a microbatch
LAG = {"cpu": 0, "cuda": 1}  # steps under way while one is read: one keeps a GPU busy, and a CPU is not waited for


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
class Microbatch:
    """Samples that run at once, and the batch of them on the device; `weightless` ones keep the other ranks company."""

    samples: Sequence[Tokens]
    batch: Batch
    weightless: bool = False


@dataclass(frozen=True)
class Probe:
    """Probes that run at once: which of all, the batch of them, and the samples themselves."""

    ids: Sequence[int]
    batch: Batch
    samples: Sequence[Tokens]


@dataclass(frozen=True)
class Prepared:
    """The data of one step on the device, and what the host counts of it."""

    tokens: int  # of the step, all ranks
    denominators: Mapping[str, float]
    divisors: Tensor  # [names] float64; the same on the device
    microbatches: Sequence[Microbatch]  # of this rank
    probes: Sequence[Probe]  # of this rank


@dataclass(frozen=True)
class Taken:
    """One step that the device has been given, and what it measures on the way to the host."""

    step: int  # from 0
    learning_rate: float
    tokens: int
    denominators: Mapping[str, float]
    rows: Sequence[Sequence[Tokens]]  # of each microbatch
    started: float  # seconds, of perf_counter
    values: Arriving  # float64: [microbatches or more, names] sums of this rank, [names] losses of the step, [1] norm

    def read(self) -> tuple[Tensor, dict[str, float], float]:
        """(sums of the microbatches [.., names], losses and metrics by name, norm of the gradient)."""
        values, names = self.values.read(), len(self.denominators)
        sums, losses, norm = values.split([len(values) - names - 1, names, 1])
        return sums.view(-1, names), dict(zip(self.denominators, losses.tolist(), strict=True)), float(norm)


@dataclass(frozen=True)
class Replay:
    """How to run a step again whose loss is known: the derivative by each score, and the sums to report."""

    coefficients: list[Tensor | None]  # of each microbatch of this rank, [samples, K]; None for a weightless one
    sums: Tensor  # [names] of the whole step on the main rank, zeros on the others


def _always(step: int) -> bool:
    return True


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
    lag: int = 0  # steps that may be under way while one is read; 0 reads each before its update
    ahead: bool = False  # prepare the data of the next step in the background

    def __post_init__(self) -> None:
        if not heeds_flags(self.optimizer):
            self.lag = 0  # only the host can leave an update out, so it must know first
        self._data = Ahead(self._prepare, self.plan.num_steps, self.devices.device, background=self.ahead)
        self._guard: Guard | None = None
        self._read_at = 0.0  # seconds, of perf_counter

    def run(
        self,
        progress: Progress,
        after_step: Callable[[Progress, StepReport], bool],
        due: Callable[[int], bool] = _always,
    ) -> Progress:
        """Steps until the plan ends, or until `after_step` returns False.

        Args:
            after_step: told of each step in order. With a lag the weights may be further on than that, except at the
                steps that are `due`; only there may it say False.
            due: whether something waits for the weights of just this step, counted from 1.
        """
        self._guard = None
        under_way: deque[Taken] = deque()
        with self._data:
            for step in range(progress.step, self.plan.num_steps):
                under_way.append(self.step(step))
                is_due = due(step + 1) or step + 1 == self.plan.num_steps
                ready = len(under_way) - (0 if is_due else self.lag)
                for report in self.read([under_way.popleft() for _ in range(ready)]):
                    progress.step += 1
                    progress.tokens += report.tokens
                    progress.trained_tokens += 0.0 if report.skipped else report.trained_tokens
                    progress.skipped_steps += report.skipped
                    if not after_step(progress, report):
                        return progress
        return progress

    def step(self, step: int) -> Taken:
        """One optimizer step over the global batch, given to the device; `step` counts from 0."""
        started = time.perf_counter()
        data = self._data(step)
        self.module.train()
        stage = _informed(self.stage, self.policy, data.probes, self.devices)
        sums = self._accumulate_all(stage, data)  # [microbatches or more, names]
        losses = self.devices.sum(sums.sum(0)) / data.divisors
        norm = clip(self.policy.parameters(), self.max_grad_norm)
        measured = torch.cat([sums.flatten(), losses, norm.to(losses).view(1)])
        rows = [() if part.weightless else part.samples for part in data.microbatches]
        rate = self.schedule(step)
        taken = Taken(step, rate, data.tokens, data.denominators, rows, started, Arriving(measured))
        if self.lag:
            self._guarded().hold(norm.isfinite() & losses[: len(self.stage.terms)].isfinite().all())
        if self.lag or self._is_finite(*taken.read()[1:]):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def read(self, taken: Sequence[Taken]) -> Iterator[StepReport]:
        """What steps measured. Several that are read at once share the time since the last, by their tokens.

        Raises:
            NonFiniteError: at a step that ends the run; neither it nor any after it has changed the weights.
        """
        if not taken:
            return
        values = [one.read() for one in taken]
        now = time.perf_counter()
        seconds = now - max(self._read_at, taken[0].started)
        self._read_at = now
        for one, (sums, losses, norm) in zip(taken, values, strict=True):
            finite = self._is_finite(losses, norm)
            self.skips_in_a_row = 0 if finite else self.skips_in_a_row + 1
            if self.skips_in_a_row >= self._patience:
                raise self._non_finite(one, sums, losses, norm)
            yield StepReport(
                losses={term: losses[term] for term in self.stage.terms},
                metrics={name: value for name, value in losses.items() if name not in self.stage.terms},
                grad_norm=norm,
                learning_rate=one.learning_rate,
                tokens=one.tokens,
                trained_tokens=next(iter(one.denominators.values())),
                seconds=seconds * (one.tokens / sum(other.tokens for other in taken)),
                skipped=not finite,
            )

    # --- its data ---

    def _prepare(self, step: int) -> Prepared:
        """All that a step needs of its samples; with `ahead` this runs beside the step before it."""
        device = self.devices.device
        whole = [self.samples[i] for i in self.plan.samples(step)]
        denominators = self.stage.denominators(whole)
        mine = [[self.samples[i] for i in ids] for ids in self.plan.microbatches(step, self.devices.rank)]
        return Prepared(
            tokens=sum(len(sample) for sample in whole),
            denominators=denominators,
            divisors=on_device(list(denominators.values()), np.float64, device),
            # a rank with no microbatch left runs one all the same, times zero, so that no collective waits for it
            microbatches=[Microbatch(s or whole[:1], _batch(s or whole[:1], device), not s) for s in mine],
            probes=_probes(self.stage, whole, self.plan.microbatch_tokens, self.devices),
        )

    # --- its gradient ---

    def _accumulate_all(self, stage: Stage, data: Prepared) -> Tensor:
        """Adds the gradient of every microbatch of this rank; returns the sums of each, `[microbatches, names]`.

        Where the loss is one of the whole step, its sums stand in one more row.
        """
        replay = self._replay(stage, data) if is_whole_step(stage) else None
        sums = []
        for i, part in enumerate(data.microbatches):
            with no_sync(self.module, last=i == len(data.microbatches) - 1):
                coefficients = replay.coefficients[i] if replay else None
                sums.append(self._accumulate(stage, part, data.denominators, coefficients))
        return torch.stack([*sums, replay.sums] if replay else sums)

    def _accumulate(
        self, stage: Stage, part: Microbatch, denominators: Mapping[str, float], coefficients: Tensor | None
    ) -> Tensor:
        """Adds the gradient of one microbatch; returns its sums in the order of `denominators`."""
        batch, samples = part.batch, part.samples
        with _memory_for(batch):
            if is_whole_step(stage):
                scores = stage.scores(self.module, batch, samples)
                loss = (scores * (torch.zeros_like(scores) if coefficients is None else coefficients)).sum()
                values = torch.zeros(len(denominators), dtype=torch.float64, device=scores.device)
            else:
                sums = stage.losses(self.module, batch, samples)
                loss = torch.stack([sums[name] / denominators[name] for name in stage.terms]).sum()
                values = torch.stack([sums[name].detach() for name in denominators]).double()
            loss = loss * self.devices.world_size  # DDP averages over ranks
            (loss * 0.0 if part.weightless else loss).backward()
        return values * 0.0 if part.weightless else values

    def _replay(self, stage: ScoringStage, data: Prepared) -> Replay:
        """Scores the whole step, over all ranks, and differentiates the loss by the scores."""
        with torch.no_grad():
            mine = [(part.batch, part.samples) for part in data.microbatches if not part.weightless]
            found = [(stage.scores(self.policy, *pair), stage.constants(*pair)) for pair in mine]
        everyone = self.devices.gather([(self.devices.for_gather(s), self.devices.for_gather(c)) for s, c in found])
        flat = [pair for rank in everyone for pair in rank]
        scores = torch.cat([s for s, _ in flat]).requires_grad_()
        sums = stage.whole_losses(scores, torch.cat([c for _, c in flat]))
        loss = torch.stack([sums[name] / data.denominators[name] for name in stage.terms]).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        before = sum(len(s) for rank in everyone[: self.devices.rank] for s, _ in rank)
        own = iter(gradient[before:].split([len(s) for s, _ in found] + [len(scores) - before - _rows(found)]))
        coefficients = [None if part.weightless else next(own).to(self.devices.device) for part in data.microbatches]
        values = torch.stack([sums[name].detach() for name in data.denominators]).double().to(self.devices.device)
        return Replay(coefficients, values if self.devices.rank == 0 else values * 0.0)

    # --- whether it is finite ---

    @property
    def _patience(self) -> int:
        """How many non-finite steps in a row end the run."""
        return MAX_SKIPS_IN_A_ROW if self.on_nan == "skip" else 1

    def _is_finite(self, losses: Mapping[str, float], norm: float) -> bool:
        return math.isfinite(norm) and all(math.isfinite(losses[term]) for term in self.stage.terms)

    def _guarded(self) -> Guard:
        if self._guard is None:
            self._guard = Guard(self.optimizer, self._patience, self.skips_in_a_row, self.devices.device)
        return self._guard

    def _non_finite(self, taken: Taken, sums: Tensor, losses: Mapping[str, float], norm: float) -> NonFiniteError:
        """Names the step and the rows."""
        bad = [samples for samples, s in zip(taken.rows, sums, strict=False) if not torch.isfinite(s).all()]
        rows = [place(sample.source, sample.row) for samples in bad or taken.rows for sample in samples]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        in_loss = not all(math.isfinite(losses[term]) for term in self.stage.terms)
        what = "the loss" if in_loss else f"the gradient (norm {norm})"
        tail = f" ({self.skips_in_a_row} steps in a row)" if self.on_nan == "skip" else ""
        return NonFiniteError(
            f"step {taken.step + 1}: {what} is not finite{tail}; the weights are those of step {taken.step}. Rows of "
            f"the step: {shown or 'those of another rank'}. Lower train.learning_rate, or look at these rows"
        )


def _rows(found: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(len(scores) for scores, _ in found)


def _batch(samples: Sequence[Tokens], device: torch.device) -> Batch:
    return pack(samples, ROW_MULTIPLE[device.type]).to(device)


@contextmanager
def _memory_for(batch: Batch) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"out of memory with {batch.num_tokens:,} tokens at once; lower train.microbatch_tokens below that, or "
            "set train.activation_checkpointing: selective, or true (none of them changes the result)"
        ) from None


def inform(stage: Stage, policy: nn.Module, samples: Sequence[Tokens], capacity: int, devices: Devices) -> Stage:
    """The stage as it is for a step over `samples`: over all ranks its probes are scored, `capacity` tokens at once.

    What they tell it is on the host, as the tables of an evaluation are.
    """
    return _informed(stage, policy, _probes(stage, samples, capacity, devices), devices, on_host=True)


def _probes(stage: Stage, samples: Sequence[Tokens], capacity: int, devices: Devices) -> list[Probe]:
    """The probes of a step that this rank scores."""
    if not isinstance(stage, ProbingStage):
        return []
    probes = stage.probes(samples)
    found = []
    for ids in bins([len(probe) for probe in probes], capacity)[devices.rank :: devices.world_size]:
        chosen = [probes[i] for i in ids]
        found.append(Probe(ids, _batch(chosen, devices.device), chosen))
    return found


def _informed(
    stage: Stage, policy: nn.Module, probes: Sequence[Probe], devices: Devices, *, on_host: bool = False
) -> Stage:
    """The stage with what the probes of all ranks tell."""
    if not isinstance(stage, ProbingStage):
        return stage
    table: list[tuple[Sequence[int], Tensor, Tensor]] = []
    answers: list[tuple[int, int]] = []  # (probe, branch)
    for probe in probes:
        with torch.no_grad(), _memory_for(probe.batch):
            scores = stage.scores(policy, probe.batch, probe.samples)
            constants = stage.constants(probe.batch, probe.samples)
        scores, constants = (x.cpu() if on_host else devices.for_gather(x) for x in (scores, constants))
        table.append((probe.ids, scores, constants))
        answers += [(probe.ids[document], branch) for document, branch in probe.batch.sequences]
    ranks = devices.gather((table, answers))
    everyone = [part for others, _ in ranks for part in others]
    scores, constants = _in_order(everyone) if everyone else (torch.empty(0, 0), torch.empty(0, 0))
    return stage.informed(scores, constants, [answer for _, others in ranks for answer in others])


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
    stage = stage.measuring() if isinstance(stage, MeasuringStage) else stage
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
                batch = _batch(chosen, devices.device)
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
    scores, constants = (torch.cat(parts) for parts in ([s for _, s, _ in table], [c for _, _, c in table]))
    order = on_device(np.argsort([i for ids, _, _ in table for i in ids]), np.int64, scores.device)
    return scores[order], constants[order]
