"""Losses of a reward model equal their closed forms; its measures on numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.losses.closed_forms import farthest
from tuner.errors import RecipeError
from tuner.losses import reward
from tuner.losses.bound import Bound
from tuner.types import Ranked

REWARDS = torch.tensor([[2.0, -1.0, 0.5, 9.0], [0.25, 1.5, -2.0, 3.0], [-1.0, -1.0, 7.0, 7.0]], dtype=torch.float64)
LENGTHS = [3, 4, 2]  # what lies behind them, 9.0 and 7.0, must not be read


def lists(rewards: Tensor = REWARDS) -> Ranked:
    return Ranked(rewards.clone().requires_grad_(), torch.tensor(LENGTHS))


def pairs(margins: bool = True, dtype: torch.dtype = torch.float32) -> Ranked:
    g = torch.Generator().manual_seed(5)
    rewards = (torch.randint(-200, 200, (40, 2), generator=g).double() / 64).to(dtype)
    found = torch.randint(0, 4, (40,), generator=g).to(dtype) / 2 if margins else None
    return Ranked(rewards.requires_grad_(), torch.full((40,), 2), found)


def loss_of(name: str, **parameters: object) -> Bound:
    return reward.resolve(name, parameters)


def logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bradley_terry_with_margin(weight: float, dtype: torch.dtype) -> None:
    data = pairs(dtype=dtype)
    loss = loss_of("bradley_terry", margin_weight=weight)
    assert loss.needs == ({"margins"} if weight else set())
    assert data.margins is not None
    leaf = data.rewards.detach().double().requires_grad_()
    expected = -torch.log(1 / (1 + torch.exp(-(leaf[:, 0] - leaf[:, 1] - weight * data.margins.double()))))
    values = loss(data)["bradley_terry"]
    assert farthest(values, expected) <= 1e-6 * farthest(expected, 0 * expected)
    (ours,) = torch.autograd.grad(values.sum(), data.rewards)
    (theirs,) = torch.autograd.grad(expected.sum(), leaf)
    assert farthest(ours, theirs) <= 1e-5


def test_bradley_terry_of_a_list_is_the_mean_over_its_pairs() -> None:
    values = loss_of("bradley_terry")(lists())["bradley_terry"].tolist()
    for row, n, value in zip(REWARDS.tolist(), LENGTHS, values, strict=True):
        both = list(itertools.combinations(row[:n], 2))
        assert value == pytest.approx(-sum(math.log(logistic(a - b)) for a, b in both) / len(both), rel=1e-12)


def test_plackett_luce_is_minus_the_log_of_the_probability_of_the_ranking() -> None:
    data = lists()
    values = loss_of("plackett_luce")(data)["plackett_luce"]
    for row, n, value in zip(REWARDS.tolist(), LENGTHS, values.tolist(), strict=True):
        probability = 1.0
        for k in range(n):
            probability *= math.exp(row[k]) / sum(math.exp(r) for r in row[k:n])
        assert value == pytest.approx(-math.log(probability), rel=1e-12)
    values.sum().backward()
    assert data.rewards.grad is not None and torch.isfinite(data.rewards.grad).all()
    assert data.rewards.grad[0, 3] == 0 and data.rewards.grad[2, 2:].abs().max() == 0


def test_the_probabilities_of_all_rankings_add_up_to_one() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    rankings = torch.stack([scores[list(order)] for order in itertools.permutations(range(4))])
    values = loss_of("plackett_luce")(Ranked(rankings, torch.full((24,), 4)))["plackett_luce"]
    assert float(torch.exp(-values).sum()) == pytest.approx(1.0, rel=1e-12)


def test_plackett_luce_of_a_pair_is_bradley_terry() -> None:
    data = pairs(margins=False)
    torch.testing.assert_close(
        loss_of("plackett_luce")(data)["plackett_luce"], loss_of("bradley_terry")(data)["bradley_terry"]
    )


@pytest.mark.parametrize("name", ["bradley_terry", "plackett_luce"])
def test_both_are_blind_to_a_constant_and_centring_is_not(name: str) -> None:
    loss = loss_of(name, centring=0.01)
    assert dict(loss.terms) == {name: "items", "centring": "items"}
    here, there = loss(lists()), loss(lists(REWARDS + 3))
    torch.testing.assert_close(here[name], there[name])
    for rewards, values in ((REWARDS, here), (REWARDS + 3, there)):
        for row, n, value in zip(rewards.tolist(), LENGTHS, values["centring"].tolist(), strict=True):
            both = list(itertools.combinations(row[:n], 2))
            assert value == pytest.approx(0.01 * sum((a + b) ** 2 for a, b in both) / len(both), rel=1e-12)
    assert "centring" not in loss_of(name)(lists())


def test_a_zero_head_gives_ln_2_a_pair() -> None:
    zeros = Ranked(torch.zeros(3, 2), torch.full((3,), 2))
    for name in ("bradley_terry", "plackett_luce"):
        torch.testing.assert_close(loss_of(name)(zeros)[name], torch.full((3,), math.log(2)))


def test_margins_do_not_go_with_longer_lists_and_wrong_parameters_are_refused() -> None:
    with pytest.raises(AssertionError, match="lists of two"):
        loss_of("bradley_terry", margin_weight=1.0)(Ranked(REWARDS, torch.tensor(LENGTHS), torch.ones(3)))
    with pytest.raises(RecipeError, match="loss 'plackett_luce' has no parameter 'margin_weight'"):
        loss_of("plackett_luce", margin_weight=1.0)
    with pytest.raises(RecipeError, match="centring=-1"):
        loss_of("bradley_terry", centring=-1)
    with pytest.raises(RecipeError, match="unknown loss 'sigmoid'"):
        loss_of("sigmoid")


def test_accuracy_counts_a_tie_half() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0.0, 0.0, 3.0, -1.5])
    there, back = reward.accuracy(chosen, rejected), reward.accuracy(rejected, chosen)
    assert there.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert (there + back).tolist() == [1.0] * 4  # swapped columns give the complement


def test_by_margin() -> None:
    margins = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 5.0, -1.0])
    values = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0])
    found = reward.by_margin(values, margins, [0.0, 1.0, 2.0, 3.0])
    assert list(found) == ["< 0", "0..1", "1..2", "2..3", ">= 3"]
    assert list(found.values()) == [(0.0, 1), (0.5, 2), (0.75, 2), (1.0, 1), (0.0, 1)]
    empty = reward.by_margin(values[:1], margins[:1], [0.0, 1.0])
    assert empty["0..1"] == (1.0, 1) and empty[">= 1"][1] == 0 and math.isnan(empty[">= 1"][0])


def test_calibration() -> None:
    gap = math.log(0.75 / 0.25)  # a confidence of 0.75
    chosen = torch.tensor([gap, gap, gap, 0.0, 0.0, 30.0])
    rejected = torch.tensor([0.0, 0.0, 0.0, gap, 0.0, 0.0])
    bins, error = reward.calibration(chosen, rejected, bins=4)
    assert [b.count for b in bins] == [1, 4, 1]
    assert [b.confidence for b in bins] == pytest.approx([0.5, 0.75, 1.0])
    assert [b.accuracy for b in bins] == [0.5, 0.75, 1.0]  # a tie is right half the time, as predicted
    assert error == pytest.approx(0.0, abs=1e-6)
    assert reward.calibration(rejected, chosen, bins=4)[1] == pytest.approx((4 * 0.5 + 1.0) / 6, abs=1e-6)
    assert reward.calibration(torch.empty(0), torch.empty(0)) == ((), 0.0)


def test_calibration_is_exact_for_rewards_that_made_the_labels() -> None:
    g = torch.Generator().manual_seed(0)
    gaps = torch.randn(40_000, generator=g) * 2
    flipped = torch.rand(40_000, generator=g) > gaps.sigmoid()
    chosen = torch.where(flipped, -gaps, gaps)
    assert reward.calibration(chosen, torch.zeros_like(chosen))[1] < 0.01
    assert reward.calibration(4 * chosen, torch.zeros_like(chosen))[1] > 0.05  # overconfident


def test_llama2_combined() -> None:
    helpful, safe = torch.tensor([0.9, 0.9, 0.9, 0.2]), torch.tensor([0.8, 0.1, 0.16, 0.99])
    unsafe = torch.tensor([True, False, False, False])
    found = reward.llama2_combined(helpful.logit(), safe.logit(), unsafe)
    torch.testing.assert_close(found.sigmoid(), torch.tensor([0.8, 0.1, 0.9, 0.2]))
    far = torch.tensor([90.0, -90.0])  # whose probabilities are 1 and 0 in any precision
    assert torch.equal(
        reward.llama2_combined(far, far.flip(0), torch.tensor([False, False])), torch.tensor([-90.0] * 2)
    )


def test_whitened_values_have_mean_0_and_deviation_1() -> None:
    found = reward.whiten(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]))
    assert torch.equal(reward.whiten(torch.full((3,), 0.5)), torch.zeros(3))
