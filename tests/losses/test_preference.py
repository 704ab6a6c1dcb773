"""Every preference loss equals its closed form, and the limits that its paper names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.losses.closed_forms import FORMS, Numbers, farthest, numbers, pairs_of
from tuner.errors import RecipeError
from tuner.losses import preference
from tuner.losses.bound import Bound
from tuner.types import Pairs, Scored


def loss_of(name: str, **parameters: object) -> Bound:
    return preference.resolve(name, parameters)


def gradients(loss: Tensor, n: Numbers) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss.sum(), (n.w, n.l), allow_unused=True, materialize_grads=True)


def check(label: str, dtype: torch.dtype, **instead: object) -> None:
    """Values within 1e-6 and gradients within 1e-5 of the closed form, relative to the largest."""
    name, parameters, form = FORMS[label]
    n = numbers()
    n = replace(n, w=n.w.requires_grad_(), l=n.l.requires_grad_())
    expected = form(n)
    slopes = gradients(expected, n)
    pairs = pairs_of(replace(n, w=n.w.detach(), l=n.l.detach()), dtype)
    values = loss_of(name, **{**parameters, **instead})(pairs)[name]
    assert values.shape == (24,) and values.dtype == dtype
    assert farthest(values, expected) <= 1e-6 * farthest(expected, 0 * expected)
    found = torch.autograd.grad(values.sum(), (pairs.chosen.policy, pairs.rejected.policy), materialize_grads=True)
    for ours, theirs in zip(found, slopes, strict=True):
        largest = farthest(theirs, 0 * theirs)
        assert largest > 0 and farthest(ours, theirs) <= 1e-5 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("label", FORMS)
def test_closed_form(label: str, dtype: torch.dtype) -> None:
    check(label, dtype)


def test_every_loss_and_every_parameter_has_a_closed_form() -> None:
    options = {"nll_weight", "ld_alpha"}  # tested below, and in test_options.py
    shared = {"wpo", "length_normalized", "f_divergence", "f_alpha"}  # in one function for all losses
    seen: dict[str, set[str]] = {}
    for name, parameters, _ in FORMS.values():
        seen.setdefault(name, {"beta"}).update(parameters)
    for name in set(preference.LOSSES.registry) - {"mixture", "kto", "bco"}:
        schema = preference.LOSSES.registry.get(name).__annotations__
        assert set(schema) - options - shared <= seen[name], name
    assert shared <= set().union(*seen.values())


@pytest.mark.parametrize(
    ("label", "instead"),
    [
        ("cdpo", {"label_smoothing": 0.0}),  # what TRL 1.16 does with it
        ("robust", {"label_smoothing": 0.1001}),
        ("ipo", {"length_normalized": True}),
        ("r-dpo", {"length_penalty": 0.0}),
        ("offset dpo", {"margin_weight": 0.0}),
        ("hinge with margin", {"margin_weight": 0.0}),
        ("wpo", {"wpo": "none"}),
        ("f-dpo alpha", {"f_alpha": 0.31}),
        ("bco", {"reward_shift": False}),
        ("simpo", {"gamma": 0.0}),
        ("discopop", {"tau": 0.51}),
        ("apo zero", {"length_normalized": True}),
    ],
)
def test_mutant_another_value_of_a_parameter(label: str, instead: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        check(label, torch.float64, **instead)


def at_start(count: int = 6) -> Pairs:
    """Policy and reference are the same model, so every log-ratio is 0."""
    n = numbers(count)
    return pairs_of(replace(n, w=n.rw, l=n.rl))


# Value of each pair when the policy is still the reference, beta 0.1 and all else as it is.
LN2 = math.log(2)
START: Mapping[str, float] = {
    "sigmoid": LN2,
    "robust": LN2,
    "ipo": 25.0,
    "hinge": 1.0,
    "exo_pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "discopop": 0.5 * LN2 + 0.5,
    "nca_pair": 2 * LN2,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "bco_pair": 2 * LN2,
    "aot": LN2,
    "aot_unpaired": LN2,
}


@pytest.mark.parametrize("name", START)
def test_value_at_the_start(name: str) -> None:
    parameters = {"label_smoothing": 0.25} if name == "robust" else {}
    values = loss_of(name, **parameters)(at_start())[name]
    torch.testing.assert_close(values, torch.full((6,), START[name]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_ln2_at_the_start_whatever_the_options(divergence: str, smoothing: float) -> None:
    alpha = {"f_alpha": 0.5} if divergence == "alpha" else {}
    loss = loss_of("sigmoid", f_divergence=divergence, label_smoothing=smoothing, length_normalized=True, **alpha)
    torch.testing.assert_close(loss(at_start())["sigmoid"], torch.full((6,), LN2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "discopop", "aot", "aot_unpaired", "simpo"])
def test_gradients_of_a_difference_cancel_between_the_sides(name: str) -> None:
    pairs = pairs_of(replace(numbers(), tw=numbers().tl))
    parameters = {"label_smoothing": 0.2} if name == "robust" else {}
    loss_of(name, **parameters)(pairs)[name].sum().backward()
    up, down = pairs.chosen.policy.grad, pairs.rejected.policy.grad
    assert up is not None and down is not None and float(up.abs().max()) > 0
    assert float((up.sum() + down.sum()).abs()) < 1e-5 * float(up.abs().sum())


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.rejected, pairs.chosen, pairs.margins)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_smoothing_is_the_mixture_of_both_orders_and_robust_undoes_it(label_smoothing: float) -> None:
    pairs, plain = pairs_of(numbers()), loss_of("sigmoid")
    there, back = plain(pairs)["sigmoid"], plain(swapped(pairs))["sigmoid"]
    smooth = loss_of("sigmoid", label_smoothing=label_smoothing)(pairs)["sigmoid"]
    torch.testing.assert_close(smooth, (1 - label_smoothing) * there + label_smoothing * back)
    if label_smoothing:
        robust = loss_of("robust", label_smoothing=label_smoothing)
        noisy = (1 - label_smoothing) * robust(pairs)["robust"] + label_smoothing * robust(swapped(pairs))["robust"]
        torch.testing.assert_close(noisy, there, rtol=1e-4, atol=1e-5)  # unbiased under flipped labels


def test_limits_of_the_divergences_are_the_two_kls() -> None:
    pairs = pairs_of(numbers(), torch.float64)

    def value(**parameters: object) -> Tensor:
        return loss_of("sigmoid", **parameters)(pairs)["sigmoid"]

    torch.testing.assert_close(value(f_divergence="alpha", f_alpha=1e-7), value(), rtol=1e-5, atol=1e-5)
    nearly = value(f_divergence="alpha", f_alpha=1 - 1e-9)
    torch.testing.assert_close(nearly, value(f_divergence="forward_kl"), rtol=1e-6, atol=1e-6)


def test_values_stay_finite_for_pairs_that_are_very_wrong_or_very_right() -> None:
    for far in (-3000.0, 3000.0):
        side = Scored(torch.tensor([far - 4000.0]), torch.tensor([50]), torch.tensor([-4000.0]))
        other = Scored(torch.tensor([-4000.0]), torch.tensor([50]), torch.tensor([-4000.0]))
        for name in START:
            policy = side.policy.clone().requires_grad_()
            pairs = Pairs(replace(side, policy=policy), other)
            parameters = {"label_smoothing": 0.2} if name == "robust" else {}
            value = loss_of(name, **parameters)(pairs)[name].sum()
            (slope,) = torch.autograd.grad(value, policy)
            assert torch.isfinite(value) and torch.isfinite(slope).all(), (name, far)


def test_orpo_of_an_answer_that_is_certain_is_finite() -> None:
    policy = torch.zeros(1, requires_grad=True)
    pairs = Pairs(Scored(policy, torch.tensor([3])), Scored(torch.tensor([-2.0]), torch.tensor([3])))
    values = loss_of("orpo")(pairs)
    (values["orpo"] + values["nll"]).sum().backward()
    assert torch.isfinite(values["orpo"]).all() and policy.grad is not None and float(policy.grad) == -1.0  # of the NLL


def test_reference_free_losses_run_without_a_reference_and_the_others_say_that_they_need_it() -> None:
    n = numbers()
    bare = Pairs(Scored(n.w.float(), n.tw.long()), Scored(n.l.float(), n.tl.long()))
    for name in set(preference.LOSSES.registry) - {"mixture"}:
        parameters = {"label_smoothing": 0.2} if name == "robust" else {}
        loss = loss_of(name, **parameters)
        assert ("reference" in loss.needs) == (name not in {"simpo", "cpo", "orpo"})
        if "reference" not in loss.needs:
            assert loss(bare)[name].shape == (24,)
        elif loss.items == "pairs":
            with pytest.raises(AssertionError):
                loss(bare)


def test_scopes() -> None:
    step = {"aot", "aot_unpaired", "bco_pair", "kto", "bco", "mixture"}
    assert {name for name in preference.LOSSES.registry if preference.scope_of(name) == "step"} == step
    assert loss_of("sigmoid").scope == "pair" and loss_of("aot").scope == "step"
    assert loss_of("bco_pair").scope == "step" and loss_of("bco_pair", reward_shift=False).scope == "pair"


@pytest.mark.parametrize("label", FORMS)
def test_a_loss_of_pair_scope_reads_one_pair_at_a_time(label: str) -> None:
    name, parameters, _ = FORMS[label]
    loss, pairs = loss_of(name, **parameters), pairs_of(numbers())
    alone = torch.cat([loss(pairs.take(slice(i, i + 1)))[name] for i in range(24)])
    same = torch.allclose(alone, loss(pairs)[name], rtol=1e-6, atol=1e-7)
    assert same == (loss.scope == "pair")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sigmod", {}, r"unknown loss 'sigmod' \(did you mean 'sigmoid'\?\); known: sigmoid, "),
        ("sigmoid", {"betta": 1}, r"loss 'sigmoid' has no parameter 'betta' \(did you mean 'beta'\?\); its parameters"),
        ("sigmoid", {"beta": 0}, r"loss 'sigmoid': beta=0: Input should be greater than 0"),
        ("sigmoid", {"beta": float("nan")}, "beta=nan"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing=0.5: Input should be less than 0.5"),
        ("sigmoid", {"ld_alpha": 1.5}, "ld_alpha=1.5"),
        ("sigmoid", {"f_divergence": "jss"}, "f_divergence='jss': Input should be 'reverse_kl', 'forward_kl', 'js'"),
        ("sigmoid", {"f_divergence": "alpha"}, "f_divergence: alpha needs f_alpha"),
        ("sigmoid", {"f_alpha": 0.5}, "f_alpha=0.5 is read with f_divergence: alpha only"),
        ("robust", {}, "label_smoothing=None: Field required"),
        ("robust", {"label_smoothing": 0.0}, "greater than 0"),
        ("exo_pair", {"label_smoothing": 0.0}, "greater than 0"),
        ("hinge", {"label_smoothing": 0.1}, "loss 'hinge' has no parameter 'label_smoothing'"),
        ("ipo", {"margin_weight": 1.0}, "loss 'ipo' has no parameter 'margin_weight'"),
        ("nca_pair", {"f_divergence": "js"}, "loss 'nca_pair' has no parameter 'f_divergence'"),
        ("aot", {"wpo": "plain"}, "loss 'aot' has no parameter 'wpo'"),
        ("simpo", {"length_normalized": True}, "loss 'simpo' has no parameter 'length_normalized'"),
        ("kto", {"length_normalized": True}, "loss 'kto' has no parameter 'length_normalized'"),
        ("kto", {"nll_weight": -0.2}, "nll_weight=-0.2: Input should be greater than or equal to 0"),
        ("bradley_terry", {}, "unknown loss 'bradley_terry'"),
    ],
)
def test_what_a_loss_does_not_read_is_refused(name: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loss_of(name, **parameters)
