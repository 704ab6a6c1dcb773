"""What a report says of rewards and lengths, against numpy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tuner.losses import measures
from tuner.losses.measures import (
    against_length,
    ahead,
    correlation,
    labels_against_length,
    length_explains,
    mean_and_error,
)


def test_correlation_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50).astype(np.float32), rng.integers(1, 9, 50)
    found = correlation(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1]), ([1.0], [1.0]), ([0.0, 1e-7], [1.0, 2.0])],
)
def test_a_correlation_with_a_constant_is_none(x: list[float], y: list[float]) -> None:
    assert correlation(torch.tensor(x), torch.tensor(y), noise=1e-6) is None


def test_mean_and_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = mean_and_error(torch.tensor(values))
    assert (mean, error) == pytest.approx((4.0, np.std(values, ddof=1) / 2))
    assert mean_and_error(torch.tensor([3.0])) == (3.0, None)


REWARDS = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, -1.0]])  # [P, 2]
TOKENS = torch.tensor([[5.0, 3.0], [4.0, 4.0], [2.0, 9.0]])


def check_against_length() -> None:
    found = against_length(REWARDS, TOKENS)
    assert found == pytest.approx(
        {
            "chosen_tokens": 11 / 3,
            "rejected_tokens": 16 / 3,
            "longer_is_better": 0.5,  # one longer, one tie, one shorter
            "reward_length_correlation": np.corrcoef([2, 1, 0, 3, 1, -1], [5, 3, 4, 4, 2, 9])[0, 1],
            "preferred_length_correlation": np.corrcoef([1, 0, 1, 0, 1, 0], [5, 3, 4, 4, 2, 9])[0, 1],
        }
    )


def test_lengths_of_answers_and_their_rewards() -> None:
    check_against_length()
    assert "reward_length_correlation" not in against_length(REWARDS * 0, TOKENS)


def test_mutant_lengths_of_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    original = measures.correlation
    monkeypatch.setattr(measures, "correlation", lambda x, y, noise=0.0: original(x, y.view(-1, 2).flip(1).flatten()))
    with pytest.raises(AssertionError):
        check_against_length()


def test_couples_are_counted_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 20, 70), rng.integers(0, 17, 31)  # with many ties
    wins = [(a > b) + 0.5 * (a == b) for a in good for b in bad]
    assert ahead(torch.from_numpy(good), torch.from_numpy(bad)) == pytest.approx(np.mean(wins), abs=1e-12)
    assert ahead(torch.zeros(3), torch.zeros(2)) == 0.5


def test_lengths_of_labelled_answers() -> None:
    rewards, tokens = REWARDS.flatten(), TOKENS.flatten()
    good = torch.tensor([True, True, False, False, True, False])
    assert labels_against_length(rewards, tokens, good) == pytest.approx(
        {
            "desirable_tokens": 10 / 3,  # of 5, 3, 2
            "undesirable_tokens": 17 / 3,  # of 4, 4, 9
            "longer_is_better": 2 / 9,  # the 5 over both 4s
            "reward_length_correlation": np.corrcoef([2, 1, 0, 3, 1, -1], [5, 3, 4, 4, 2, 9])[0, 1],
            "preferred_length_correlation": np.corrcoef([1, 1, 0, 0, 1, 0], [5, 3, 4, 4, 2, 9])[0, 1],
        }
    )
    one = labels_against_length(rewards * 0, tokens, good | True)
    assert one == {"desirable_tokens": pytest.approx(27 / 6)}, "nothing is compared, and nothing correlated"


@pytest.mark.parametrize(
    ("share", "longer", "pairs", "explained"),
    [
        (1.0, 1.0, 20, True),  # chosen is only longer, and the policy learnt that
        (0.9, 0.0, 20, True),  # or only shorter
        (0.62, 0.60, 400, True),
        (0.7, 0.60, 400, False),  # by more than two standard errors, 0.049
        (0.5, 0.54, 400, False),  # length itself is hardly better than chance: within 0.05
        (0.93, 0.5, 400, False),
    ],
)
def test_when_length_alone_may_explain_an_accuracy(share: float, longer: float, pairs: int, explained: bool) -> None:
    assert math.sqrt(0.6 * 0.4 / 400) * 2 == pytest.approx(0.049, abs=1e-4)
    assert length_explains(share, longer, pairs) is explained
