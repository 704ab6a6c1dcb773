"""What goes with several losses: length terms, policy weights, the NLL term, and mixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.losses.closed_forms import ls, numbers, pairs_of
from tuner.errors import RecipeError
from tuner.losses import preference
from tuner.types import Pairs, Scored

# Two pairs, token by token, policy and reference: the chosen answer is longer in the first, shorter in the second.
CHOSEN = ([-1.0, -2.0, -3.0, -4.0], [-0.5, -0.25])
REJECTED = ([-2.0, -1.0], [-1.5, -0.5, -0.75])
REF_CHOSEN = ([-1.5, -1.5, -2.0, -5.0], [-1.0, -1.0])
REF_REJECTED = ([-1.0, -2.5], [-0.5, -0.5, -0.25])


def token_pairs(dtype: torch.dtype = torch.float64) -> Pairs:
    def side(policy: tuple[list[float], ...], ref: tuple[list[float], ...], other: tuple[list[float], ...]) -> Scored:
        shortest = [min(len(a), len(b)) for a, b in zip(policy, other, strict=True)]

        def sums(rows: tuple[list[float], ...], cut: bool) -> Tensor:
            cuts = [sum(row[:k] if cut else row) for row, k in zip(rows, shortest, strict=True)]
            return torch.tensor(cuts, dtype=dtype)

        return Scored(
            policy=sums(policy, False).requires_grad_(),
            tokens=torch.tensor([len(row) for row in policy]),
            reference=sums(ref, False),
            shared=sums(policy, True).requires_grad_(),
            shared_reference=sums(ref, True),
        )

    return Pairs(side(CHOSEN, REF_CHOSEN, REJECTED), side(REJECTED, REF_REJECTED, CHOSEN))


def desensitized(rows: tuple[list[float], ...], other: tuple[list[float], ...], alpha: float) -> Tensor:
    """LD-DPO from the tokens themselves: each weighs 1 up to the shorter length and α beyond it."""
    sums = []
    for row, opposite in zip(rows, other, strict=True):
        sums.append(sum(p if t < len(opposite) else alpha * p for t, p in enumerate(row)))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_ld_dpo(alpha: float, normalized: bool) -> None:
    loss = preference.resolve("sigmoid", {"ld_alpha": alpha, "length_normalized": normalized})
    assert ("shared" in loss.needs) == (alpha < 1)
    w = desensitized(CHOSEN, REJECTED, alpha) - desensitized(REF_CHOSEN, REJECTED, alpha)
    l = desensitized(REJECTED, CHOSEN, alpha) - desensitized(REF_REJECTED, CHOSEN, alpha)  # noqa: E741
    if normalized:
        w, l = w / torch.tensor([4, 2]), l / torch.tensor([2, 3])  # noqa: E741
    pairs = token_pairs()
    values = loss(pairs)["sigmoid"]
    torch.testing.assert_close(values, -ls(0.1 * (w - l)), rtol=1e-12, atol=0)
    if alpha == 0.3 and not normalized:
        # what the chosen answer is longer weighs α in the gradient, what both have weighs 1 in all
        wanted = [pairs.chosen.policy, pairs.chosen.shared, pairs.rejected.policy]
        tail, head, _ = torch.autograd.grad(values.sum(), [t for t in wanted if t is not None])
        torch.testing.assert_close(tail / (tail + head), torch.full((2,), 0.3, dtype=torch.float64))


def test_ld_dpo_goes_with_every_loss_that_has_a_reference() -> None:
    for name in set(preference.LOSSES.registry) - {"mixture", "kto", "bco", "simpo", "cpo", "orpo"}:
        parameters = {"label_smoothing": 0.2} if name == "robust" else {}
        cut = preference.resolve(name, {**parameters, "ld_alpha": 0.25})(token_pairs())[name]
        whole = preference.resolve(name, parameters)(token_pairs())[name]
        assert not torch.allclose(cut, whole), name


def test_wpo_weights_have_no_gradient_and_multiply_each_pair() -> None:
    collision = torch.tensor([-30.0, -20.0])
    pairs = token_pairs(torch.float32)
    pairs = Pairs(replace(pairs.chosen, collision=collision / 10), replace(pairs.rejected, collision=collision / 20))
    plain = preference.resolve("ipo", {})(pairs)["ipo"]
    loss = preference.resolve("ipo", {"wpo": "sampled"})
    assert loss.needs == {"reference", "collision"}
    weighted = loss(pairs)["ipo"]
    w = torch.exp((pairs.chosen.policy - collision / 10) / torch.tensor([4, 2]))
    v = torch.exp((pairs.rejected.policy - collision / 20) / torch.tensor([2, 3]))
    torch.testing.assert_close(weighted, plain * (w * v).detach())
    (ours,) = torch.autograd.grad(weighted.sum(), pairs.chosen.policy, retain_graph=True)
    (theirs,) = torch.autograd.grad((plain * (w * v).detach()).sum(), pairs.chosen.policy)
    torch.testing.assert_close(ours, theirs)


def test_sampled_weights_are_one_for_a_policy_that_is_uniform() -> None:
    # p = 1/V everywhere: log p = -log V and log Σ p² = -log V, whatever the tokens are
    tokens = torch.tensor([3, 7])
    side = Scored(-tokens * 2.0, tokens, -tokens * 2.0, collision=-tokens * 2.0)
    pairs = Pairs(side, side)
    weighted = preference.resolve("sigmoid", {"wpo": "sampled"})(pairs)["sigmoid"]
    torch.testing.assert_close(weighted, preference.resolve("sigmoid", {})(pairs)["sigmoid"])
    assert float(preference.resolve("sigmoid", {"wpo": "plain"})(pairs)["sigmoid"].max()) < 0.02


def test_the_nll_term_counts_the_chosen_tokens() -> None:
    pairs = pairs_of(numbers())
    loss = preference.resolve("sigmoid", {"nll_weight": 0.2})
    assert loss.terms == {"sigmoid": "items", "nll": "chosen_tokens"}
    assert loss.denominators(items=24, chosen_tokens=500.0) == {"sigmoid": 24, "nll": 500.0}
    values = loss(pairs)
    torch.testing.assert_close(values["nll"], -0.2 * pairs.chosen.policy)
    torch.testing.assert_close(values["sigmoid"], preference.resolve("sigmoid", {})(pairs)["sigmoid"])
    assert preference.resolve("sigmoid", {}).terms == {"sigmoid": "items"}
    # no option touches the term: an average token is an average token
    shaped = preference.resolve("sigmoid", {"nll_weight": 0.2, "length_normalized": True, "f_divergence": "js"})(pairs)
    torch.testing.assert_close(shaped["nll"], values["nll"])


def test_orpo_and_cpo_bring_their_nll_term() -> None:
    for name in ("orpo", "cpo"):
        pairs = pairs_of(numbers())
        torch.testing.assert_close(preference.resolve(name, {})(pairs)["nll"], -pairs.chosen.policy)
        assert "nll" not in preference.resolve(name, {"nll_weight": 0})(pairs)


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    parts = [
        {"type": "sigmoid", "weight": 0.8, "beta": 0.3, "nll_weight": 0.5},
        {"type": "bco_pair"},
        {"type": "sigmoid", "weight": 2, "label_smoothing": 0.1},
        {"type": "cpo", "weight": 0.1},
    ]
    loss = preference.resolve("mixture", {"losses": parts, "nll_weight": 0.3})
    pairs = pairs_of(numbers())
    values = loss(pairs)
    assert dict(loss.terms) == {
        "sigmoid": "items",
        "bco_pair": "items",
        "sigmoid_2": "items",
        "cpo": "items",
        "nll": "chosen_tokens",
    }
    assert list(values) == list(loss.terms) and loss.scope == "step" and loss.needs == {"reference"}

    def alone(name: str, **parameters: object) -> Tensor:
        return preference.resolve(name, parameters)(pairs)[name]

    torch.testing.assert_close(values["sigmoid"], 0.8 * alone("sigmoid", beta=0.3))
    torch.testing.assert_close(values["bco_pair"], alone("bco_pair"))
    torch.testing.assert_close(values["sigmoid_2"], 2 * alone("sigmoid", label_smoothing=0.1))
    torch.testing.assert_close(values["cpo"], 0.1 * alone("cpo"))
    torch.testing.assert_close(values["nll"], -(0.3 + 0.8 * 0.5 + 0.1) * pairs.chosen.policy)


def test_a_mixture_asks_for_what_its_parts_need() -> None:
    def mixed(*parts: dict[str, object]) -> preference.Bound:
        return preference.resolve("mixture", {"losses": list(parts)})

    assert mixed({"type": "sigmoid"}, {"type": "hinge"}).scope == "pair"
    assert mixed({"type": "simpo"}, {"type": "orpo"}).needs == frozenset()
    assert mixed(
        {"type": "sigmoid", "ld_alpha": 0.5}, {"type": "hinge", "margin_weight": 1, "wpo": "sampled"}
    ).needs == {
        "reference",
        "shared",
        "margins",
        "collision",
    }
    assert "nll" not in mixed({"type": "sigmoid"}, {"type": "hinge"}).terms


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, r"loss 'mixture': losses=None: Field required"),
        ({"losses": [{"type": "sigmoid"}]}, "at least 2 items"),
        ({"losses": ["sigmoid", "ipo"]}, "valid dictionary"),
        ({"losses": [{"type": "ipo"}, {"type": "sigmod"}]}, r"losses\[1\]: unknown loss 'sigmod' \(did you mean"),
        (
            {"losses": [{"type": "ipo", "tau": 1}, {"type": "sigmoid"}]},
            r"losses\[0\]: loss 'ipo' has no parameter 'tau'",
        ),
        ({"losses": [{"type": "ipo", "weight": 0}, {"type": "sigmoid"}]}, r"losses\[0\]: weight=0: give a number"),
        ({"losses": [{"type": "ipo", "weight": "1"}, {"type": "sigmoid"}]}, r"losses\[0\]: weight='1'"),
        ({"losses": [{"type": "ipo", "weight": True}, {"type": "sigmoid"}]}, r"losses\[0\]: weight=True"),
        ({"losses": [{"beta": 1}, {"type": "sigmoid"}]}, r"losses\[0\]: type=None: give the name of a loss"),
        ({"losses": [{"type": "mixture"}, {"type": "sigmoid"}]}, r"losses\[0\]: type='mixture'"),
        ({"losses": [{"type": "kto"}, {"type": "sigmoid"}]}, r"losses\[0\]: 'kto' is a loss over unpaired answers"),
        ({"losses": [{"type": "ipo"}, {"type": "sigmoid"}], "beta": 1}, "loss 'mixture' has no parameter 'beta'"),
    ],
)
def test_a_wrong_mixture_is_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preference.resolve("mixture", parameters)


def test_the_length_penalty_lowers_the_pull_of_a_chosen_answer_that_is_longer() -> None:
    # R-DPO's sign: the reward difference is βh + α(|y_w| - |y_l|), so a longer chosen answer is partly explained
    def pull(longer: int, **parameters: float) -> float:
        policy = torch.zeros(1, requires_grad=True)
        zero = torch.zeros(1)
        pairs = Pairs(Scored(policy, torch.tensor([10 + longer]), zero), Scored(zero, torch.tensor([10]), zero))
        (slope,) = torch.autograd.grad(preference.resolve("sigmoid", parameters)(pairs)["sigmoid"].sum(), policy)
        return -float(slope)

    assert pull(20) == pytest.approx(0.05)
    assert pull(20, length_penalty=0.02) < 0.041 and pull(-5, length_penalty=0.02) > 0.051
