"""What a stage brings to the loop: what to count, what to minimise, and what its loss must know of a whole step.

Nothing here may wait for the device: `losses`, `scores`, `constants` and `informed` run in every step, and so does
`whole_losses` of a loss over the whole step. What they have to know on the host they read from the samples or from the
host's part of a batch. (BCO on single answers, which looks for the good and the bad ones of a step in its table, waits
once a step; and so do several ranks where they send each other their scores.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor

from tuner.types import Batch, Tokens

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
class MeasuringStage(Stage, Protocol):
    """A stage that says more of held-out samples than it pays for in training."""

    def measuring(self) -> Stage:
        """The stage of an evaluation."""


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

    def informed(self, scores: Tensor, constants: Tensor, answers: Sequence[tuple[int, int]]) -> Stage:
        """The stage of this step, from `[probes, K]` and `[probes, C]`; with no probes both are empty.

        `answers` are the scored ones, each as (probe, branch): on the host, where the tensors need not be read.
        """


def is_whole_step(stage: Stage) -> TypeGuard[ScoringStage]:
    """Whether a stage must be scored over the whole step before it is differentiated."""
    return isinstance(stage, ScoringStage) and stage.whole_step
