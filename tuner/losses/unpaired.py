"""Log-probs of single answers, each labelled good or bad -> losses, one value per answer.

`r` is β log π(y|x) / π_ref(y|x), `[R]`. The loop divides the sum of what a loss returns by the answers of the whole
optimizer step. Both losses read a statistic of the step, and are marked so. With both goes an NLL term of the good
answers, which has a denominator of its own (`options.desirable_nll`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.losses.bound import Binder, Bound, Need, Per, Positive, Scope, read_by, scope_with, show_parameters
from tuner.losses.options import desirable_nll
from tuner.types import Scored, Unpaired

Formula = Callable[..., Tensor]
# Name -> scope and binder; preference.py files them beside the losses over pairs, for the same stage runs both.
UNPAIRED: dict[str, tuple[Scope, Binder]] = {}


def unpaired_loss(name: str, *needs: Need) -> Callable[[Formula], Formula]:
    """Decorator that files a formula over `Unpaired` under `name`, with what it needs beside the reference."""

    def add(formula: Formula) -> Formula:
        def bind(**parameters: Any) -> Bound:
            own, option = read_by(formula, parameters), read_by(desirable_nll, parameters)

            def compute(rows: Unpaired) -> dict[str, Tensor]:
                nll = desirable_nll(rows, **option)
                terms = {name: formula(rows, **own)}
                return terms if nll is None else {**terms, "nll": nll}

            terms: dict[str, Per] = {name: "items"}
            if parameters["nll_weight"]:
                terms["nll"] = "chosen_tokens"
            scope = scope_with("step", parameters)
            return Bound(name, "unpaired", scope, frozenset({"reference", *needs}), terms, compute)

        show_parameters(bind, [formula, desirable_nll])
        bind.__name__ = name
        bind.__doc__ = formula.__doc__
        UNPAIRED[name] = ("step", bind)
        return formula

    return add


@unpaired_loss("kto", "mismatched")
def kto(
    rows: Unpaired, *, beta: Positive = 0.1, desirable_weight: Positive = 1.0, undesirable_weight: Positive = 1.0
) -> Tensor:
    """KTO (arXiv 2402.01306): λ_D (1 - σ(r - βz)) for good answers, λ_U (1 - σ(βz - r)) for bad ones.

    z = `kl_estimate` has no gradient. It is the only thing that rows share, so a stage may also give every microbatch
    the mismatched answers of the whole step and save the replay.
    """
    assert rows.mismatched is not None
    surplus = beta * (rows.answers.ratio - kl_estimate(rows.mismatched))
    good = desirable_weight * (1 - surplus.sigmoid())
    return torch.where(rows.desirable, good, undesirable_weight * (1 - (-surplus).sigmoid()))


def kl_estimate(mismatched: Scored) -> Tensor:
    """max(0, mean log π(y'|x)/π_ref(y'|x)) over mismatched answers y' (arXiv 2402.01306), a scalar.

    An estimate of KL(π ‖ π_ref) that is biased low and bounded by 0; without any mismatched answer it is that bound.
    """
    ratio = mismatched.ratio.detach()
    return ratio.new_zeros(()) if ratio.numel() == 0 else ratio.mean().clamp(min=0)


def mismatches(prompts: Sequence[Hashable]) -> tuple[tuple[int, int], ...]:
    """(row of the prompt, row of the answer) of each mismatched answer of an optimizer step.

    The answers are moved on by the fewest rows that part most of them from their own prompt, however often a prompt
    recurs (both answers of what was a pair stand side by side). What still meets its own prompt is left out: it would
    measure the answer that the loss is raising. Depends on the prompts and their order alone. One row gives none.
    """
    number: dict[Hashable, int] = {}
    ids = np.array([number.setdefault(prompt, len(number)) for prompt in prompts])
    n, by, best = len(ids), 0, np.empty(0, np.int64)
    for shift in range(1, n):
        found = np.flatnonzero(ids != np.roll(ids, shift))
        if len(found) > len(best):
            by, best = shift, found
        if len(best) == n:
            break
    return tuple((int(i), int(i - by) % n) for i in best)


@unpaired_loss("bco")
def bco(rows: Unpaired, *, beta: Positive = 0.1, reward_shift: bool = True) -> Tensor:
    """BCO (arXiv 2404.04656): -log σ(r - δ) for good answers, -log σ(-(r - δ)) for bad ones.

    δ = ½ (mean r of the good + mean r of the bad) over the optimizer step, without gradient; of a step that has one
    kind only, the mean of that. The paper keeps a running mean instead, which would be one more thing to resume.
    Without reward_shift δ = 0. All answers of a step weigh the same, where the paper averages each kind by itself.
    """
    r = beta * rows.answers.ratio
    delta = r.new_zeros(())
    if reward_shift:
        means = [kind.mean() for kind in (r.detach()[rows.desirable], r.detach()[~rows.desirable]) if kind.numel()]
        delta = torch.stack(means).mean()
    return -logsigmoid(torch.where(rows.desirable, r - delta, delta - r))
