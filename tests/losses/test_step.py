"""A loss over the whole optimizer step, replayed in microbatches, gives the gradients of the whole step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tuner.losses import preference
from tuner.losses.bound import Bound, replay, slopes
from tuner.types import Pairs, Scored, Unpaired

COUNT = 12
CUTS: dict[str, list[slice]] = {
    "one": [slice(0, 12)],
    "even": [slice(0, 4), slice(4, 8), slice(8, 12)],
    "uneven": [slice(0, 1), slice(1, 9), slice(9, 12)],
}
STEP_LOSSES: list[tuple[str, dict[str, object]]] = [
    ("aot", {"label_smoothing": 0.1, "nll_weight": 0.2}),
    ("aot_unpaired", {"ld_alpha": 0.5}),
    ("bco_pair", {"wpo": "plain"}),
    ("mixture", {"losses": [{"type": "sigmoid", "weight": 0.8}, {"type": "aot"}], "nll_weight": 1.0}),
    ("kto", {"undesirable_weight": 1.5, "nll_weight": 0.2}),
    ("bco", {"nll_weight": 0.2}),
    ("sigmoid", {}),  # replay is right for a loss of pair scope too
]


class Model:
    """Stands for a policy: three weights that turn the features of an answer into its log-probs."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.weights = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
        self.features = torch.randn(3 * COUNT, 2, 3, generator=g, dtype=torch.float64)
        self.tokens = torch.randint(2, 9, (3 * COUNT,), generator=g)
        self.reference = torch.randn(3 * COUNT, 2, generator=g, dtype=torch.float64) - 6
        self.desirable = torch.rand(COUNT, generator=g) < 0.5

    def score(self, first: int, rows: slice) -> Scored:
        at = slice(first + rows.start, first + rows.stop)
        logps = torch.tanh(self.features[at] @ self.weights) * 3 - 6
        shared, reference = logps[:, 1] / 2, self.reference[at]
        return Scored(logps[:, 0], self.tokens[at], reference[:, 0], shared, reference[:, 1] / 2)

    def items(self, kind: str, rows: slice) -> Pairs | Unpaired:
        if kind == "pairs":
            return Pairs(self.score(0, rows), self.score(COUNT, rows))
        with torch.no_grad():
            mismatched = self.score(2 * COUNT, slice(0, COUNT))
        return Unpaired(self.score(0, rows), self.desirable[rows], mismatched)


def gradient(loss: Bound, cuts: list[slice], step: Callable[[Bound, Model, list[slice]], Tensor]) -> Tensor:
    model = Model()
    (found,) = torch.autograd.grad(step(loss, model, cuts), model.weights)
    return found


def denominators(loss: Bound, model: Model) -> dict[str, float]:
    return loss.denominators(COUNT, float(model.tokens[:COUNT].sum()))


def whole(loss: Bound, model: Model, _: list[slice]) -> Tensor:
    values, counts = loss(model.items(loss.items, slice(0, COUNT))), denominators(loss, model)
    return torch.stack([value.sum() / counts[term] for term, value in values.items()]).sum()


def replayed(loss: Bound, model: Model, cuts: list[slice]) -> Tensor:
    with torch.no_grad():
        parts = [model.items(loss.items, rows) for rows in cuts]
        step = Pairs.cat(parts) if isinstance(parts[0], Pairs) else Unpaired.cat(parts)  # type: ignore[arg-type]
    if isinstance(step, Unpaired):  # every part brought the mismatched answers of the whole step
        step = Unpaired(step.answers, step.desirable, parts[0].mismatched)  # type: ignore[union-attr]
    values, lines = slopes(loss, step, denominators(loss, model))
    assert not any(value.requires_grad for value in values.values())
    pieces = [replay(lines.take(rows), model.items(loss.items, rows)) for rows in cuts]  # type: ignore[type-var]
    return torch.stack(pieces).sum()


def microbatched(loss: Bound, model: Model, cuts: list[slice]) -> Tensor:
    counts = denominators(loss, model)
    parts = [loss(model.items(loss.items, rows)) for rows in cuts]
    return torch.stack([v.sum() / counts[term] for values in parts for term, v in values.items()]).sum()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("name", "parameters"), STEP_LOSSES, ids=[name for name, _ in STEP_LOSSES])
def test_replay_gives_the_gradient_of_the_whole_step(
    name: str, parameters: dict[str, object], cuts: list[slice]
) -> None:
    loss = preference.resolve(name, parameters)
    expected = gradient(loss, cuts, whole)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(gradient(loss, cuts, replayed), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco_pair", "bco"])
def test_mutant_each_microbatch_by_itself_gives_another_gradient(name: str) -> None:
    loss = preference.resolve(name, {})
    there, here = gradient(loss, CUTS["even"], whole), gradient(loss, CUTS["even"], microbatched)
    assert float((there - here).abs().max()) > 1e-4


def test_kto_needs_no_replay_when_each_microbatch_has_the_mismatched_answers_of_the_step() -> None:
    loss = preference.resolve("kto", {"nll_weight": 0.2})
    there, here = gradient(loss, CUTS["uneven"], whole), gradient(loss, CUTS["uneven"], microbatched)
    torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco_pair"])
def test_the_sum_over_a_step_does_not_depend_on_the_order_of_its_pairs(name: str) -> None:
    model, loss = Model(), preference.resolve(name, {})
    pairs = model.items("pairs", slice(0, COUNT))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    sums = [loss(p)[name].sum() for p in (pairs, pairs.take(order))]
    torch.testing.assert_close(sums[0], sums[1])


def test_the_values_of_slopes_are_those_of_the_loss() -> None:
    model, loss = Model(), preference.resolve("aot", {"nll_weight": 0.2})
    pairs = model.items("pairs", slice(0, COUNT))
    assert isinstance(pairs, Pairs)
    values, lines = slopes(loss, pairs, denominators(loss, model))
    for term, value in loss(pairs).items():
        torch.testing.assert_close(values[term], value)
    assert lines.chosen.shared is not None and float(lines.chosen.shared.abs().max()) == 0  # aot reads whole sums here


def test_take_and_cat_are_inverse_and_refuse_a_sum_that_one_part_lacks() -> None:
    model = Model()
    pairs = model.items("pairs", slice(0, COUNT))
    assert isinstance(pairs, Pairs)
    again = Pairs.cat([pairs.take(rows) for rows in CUTS["uneven"]])
    for ours, theirs in ((again.chosen, pairs.chosen), (again.rejected, pairs.rejected)):
        torch.testing.assert_close(ours.policy, theirs.policy)
        torch.testing.assert_close(ours.shared, theirs.shared)
        assert ours.collision is None
    bare = Pairs(Scored(pairs.chosen.policy, pairs.chosen.tokens), pairs.rejected)
    with pytest.raises(TypeError):
        Pairs.cat([pairs, bare])
