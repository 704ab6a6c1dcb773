"""KTO and BCO equal their closed forms; the KL estimate and the pairing behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.losses.closed_forms import farthest, ls, numbers, s
from tuner.losses import preference
from tuner.losses.unpaired import kl_estimate, mismatches
from tuner.types import Scored, Unpaired

DESIRABLE = torch.tensor([True, False, False, True] * 6)


def answers(mismatched_by: float = 0.5) -> Unpaired:
    n = numbers()
    policy = n.w.float().requires_grad_()
    reference = n.rl.float()
    mismatched = Scored((n.rl + mismatched_by).float().requires_grad_(), n.tl.long(), reference)
    return Unpaired(Scored(policy, n.tw.long(), n.rw.float()), DESIRABLE, mismatched)


def check(name: str, rows: Unpaired, expected: Tensor, leaf: Tensor, **parameters: object) -> None:
    values = preference.resolve(name, parameters)(rows)[name]
    assert farthest(values, expected) <= 1e-6 * farthest(expected, 0 * expected)
    (ours,) = torch.autograd.grad(values.sum(), rows.answers.policy)
    (theirs,) = torch.autograd.grad(expected.sum(), leaf)
    assert farthest(ours, theirs) <= 1e-5 * farthest(theirs, 0 * theirs)


def kto_form(policy: Tensor, z: float, good: float, bad: float) -> Tensor:
    """λ_y - v(x, y), as in the paper."""
    r = 0.2 * (policy - numbers().rw)
    value = torch.where(DESIRABLE, good * s(r - 0.2 * z), bad * s(0.2 * z - r))
    return torch.where(DESIRABLE, good, bad) - value


@pytest.mark.parametrize(("shift", "z"), [(0.5, 0.5), (-3.0, 0.0)])
@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (1.25, 0.75)])
def test_kto(shift: float, z: float, good: float, bad: float) -> None:
    leaf = numbers().w.requires_grad_()
    parameters = {"beta": 0.2, "desirable_weight": good, "undesirable_weight": bad}
    check("kto", answers(shift), kto_form(leaf, z, good, bad), leaf, **parameters)


@pytest.mark.parametrize("wrong", [{"z": 0.0}, {"good": 1.1}, {"bad": 1.1}])
def test_mutant_kto_without_its_estimate_or_weights(wrong: dict[str, float]) -> None:
    leaf = numbers().w.requires_grad_()
    form = kto_form(leaf, **{"z": 0.5, "good": 1.0, "bad": 1.0, **wrong})
    with pytest.raises(AssertionError):
        check("kto", answers(0.5), form, leaf, beta=0.2)


def test_kto_at_the_start_is_half_the_weights_and_its_estimate_has_no_gradient() -> None:
    n = numbers()
    rows = Unpaired(
        Scored(n.rw.requires_grad_(), n.tw.long(), n.rw.detach()),
        DESIRABLE,
        Scored(n.rl.requires_grad_(), n.tl.long(), n.rl.detach()),
    )
    values = preference.resolve("kto", {"desirable_weight": 2.0})(rows)["kto"]
    torch.testing.assert_close(values, torch.where(DESIRABLE, 1.0, 0.5).double())
    values.sum().backward()
    assert rows.mismatched is not None and rows.mismatched.policy.grad is None


def test_kl_estimate_is_the_mean_ratio_and_never_below_zero() -> None:
    def estimate(ratios: list[float]) -> float:
        zeros = torch.zeros(len(ratios))
        return float(kl_estimate(Scored(torch.tensor(ratios), zeros.long(), zeros)))

    assert estimate([1.0, 2.0, -1.5]) == 0.5
    assert estimate([1.0, -3.0]) == 0.0
    assert estimate([]) == 0.0


def bco_form(policy: Tensor, desirable: Tensor) -> Tensor:
    r = 0.1 * (policy - numbers().rw)
    means = [float(r[kind].detach().mean()) for kind in (desirable, ~desirable) if kind.any()]
    shift = sum(means) / len(means)
    return torch.where(desirable, -ls(r - shift), -ls(-(r - shift)))


@pytest.mark.parametrize("kinds", ["both", "good", "bad"])
def test_bco(kinds: str) -> None:
    desirable = {"both": DESIRABLE, "good": torch.ones(24) > 0, "bad": torch.zeros(24) > 0}[kinds]
    leaf = numbers().w.requires_grad_()
    rows = Unpaired(answers().answers, desirable)
    check("bco", rows, bco_form(leaf, desirable), leaf)
    plain = preference.resolve("bco", {"reward_shift": False})(rows)["bco"]
    r = 0.1 * rows.answers.ratio
    torch.testing.assert_close(plain, torch.where(desirable, -ls(r), -ls(-r)))


def test_bco_at_the_start_is_ln_2() -> None:
    n = numbers()
    same = Scored(n.rw, n.tw.long(), n.rw)
    torch.testing.assert_close(
        preference.resolve("bco", {})(Unpaired(same, DESIRABLE))["bco"],
        torch.full((24,), math.log(2), dtype=torch.float64),
    )


def test_bco_does_not_move_with_a_constant_in_all_rewards() -> None:
    rows = answers()
    moved = Scored(rows.answers.policy + 7.0, rows.answers.tokens, rows.answers.reference)
    loss = preference.resolve("bco", {})
    torch.testing.assert_close(loss(rows)["bco"], loss(Unpaired(moved, DESIRABLE))["bco"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_the_nll_term_is_of_the_good_answers_alone(name: str) -> None:
    loss, rows, n = preference.resolve(name, {"nll_weight": 0.2}), answers(), numbers()
    values = loss(rows)
    torch.testing.assert_close(values[name], preference.resolve(name, {})(rows)[name])
    assert farthest(values["nll"], torch.where(DESIRABLE, -0.2 * n.w, 0 * n.w)) <= 1e-6
    (slope,) = torch.autograd.grad(values["nll"].sum(), rows.answers.policy)
    torch.testing.assert_close(slope, torch.where(DESIRABLE, -0.2, 0.0))
    assert loss.terms == {name: "items", "nll": "chosen_tokens"}
    assert loss.denominators(items=24, chosen_tokens=500.0) == {name: 24, "nll": 500.0}
    assert set(preference.resolve(name, {})(rows)) == {name}


def test_needs() -> None:
    assert preference.resolve("kto", {}).needs == {"reference", "mismatched"}
    assert preference.resolve("bco", {}).needs == {"reference"}
    assert preference.resolve("kto", {}).items == "unpaired"
    assert preference.resolve("kto", {}).denominators(8, 100.0) == {"kto": 8}
    assert preference.resolve("bco", {"reward_shift": False}).scope == "pair"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abcd", [(0, 3), (1, 0), (2, 1), (3, 2)]),
        ("aabb", [(0, 2), (1, 3), (2, 0), (3, 1)]),  # one row on would meet its own prompt
        ("aab", [(0, 2), (2, 1)]),  # row 1 meets its own prompt whenever all others do not
        ("a", []),
        ("aaa", []),
    ],
)
def test_mismatches(prompts: str, expected: list[tuple[int, int]]) -> None:
    assert list(mismatches(prompts)) == expected


def test_mismatched_answers_are_those_of_the_step_each_at_most_once() -> None:
    prompts = [i // 2 for i in range(64)]
    found = mismatches(prompts)
    assert sorted(i for i, _ in found) == sorted(j for _, j in found) == list(range(64))
    assert all(prompts[i] != prompts[j] for i, j in found)
