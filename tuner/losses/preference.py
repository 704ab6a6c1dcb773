"""Log-probs of preferred and rejected answers -> preference losses, one value per pair.

In the formulas, y_w and y_l are the chosen and the rejected answer of a pair (`win` and `lose`), ρ their log-ratios
log π(y|x) / π_ref(y|x), sums over the tokens of the answer, and h = ρ_w - ρ_l. All are `[P]`, and so is what a loss
returns: the loop divides its sum by the pairs of the whole optimizer step. σ is the logistic function. Options that
several losses share stand in `options.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log, log1p
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tuner.errors import RecipeError
from tuner.losses.bound import (
    Bound,
    FlipRate,
    Losses,
    Need,
    NonNegative,
    Per,
    Positive,
    Scope,
    read_by,
    scope_with,
    show_parameters,
)
from tuner.losses.options import averaged, check_divergence, chosen_nll, desensitized, diverged, policy_weights
from tuner.losses.unpaired import UNPAIRED
from tuner.types import Pairs

Formula = Callable[..., Tensor]

LOSSES = Losses("loss")


def scope_of(name: str) -> Scope:
    """`step` for a loss that must see the whole optimizer step at once, else `pair`; of a mixture ask `Bound.scope`."""
    return LOSSES.scope_of(name)


def resolve(name: str, parameters: Mapping[str, Any]) -> Bound:
    """The preference loss `name` with the parameters of the recipe, checked and bound.

    Raises:
        RecipeError: no such loss, a parameter that it does not read, or a value out of its range.
    """
    return LOSSES.resolve(name, parameters)


def pair_loss(
    name: str,
    *,
    scope: Scope = "pair",
    reference: bool = True,
    divergence: bool = False,
    weights: bool = True,
    nll_weight: float = 0.0,
) -> Callable[[Formula], Formula]:
    """Decorator that files a formula over `Pairs` under `name`.

    Args:
        scope: `step` if the formula must see all pairs of the optimizer step.
        reference: whether it reads log-ratios to the reference; then `ld_alpha` and `length_normalized` go with it.
        divergence: whether it reads the log-ratios through h alone; then `f_divergence` goes with it, for the unknown
            log Z(x) of f-DPO cancels in h only.
        weights: whether `wpo` goes with it: its values belong to one pair each.
        nll_weight: the weight of the added NLL term if the recipe says nothing.
    """

    def add(formula: Formula) -> Formula:
        options: list[Callable[..., Any]] = [chosen_nll]
        options += [desensitized, averaged] if reference else []
        options += [diverged] if divergence else []
        options += [policy_weights] if weights else []

        def bind(**parameters: Any) -> Bound:
            if divergence:
                check_divergence(name, parameters["f_divergence"], parameters["f_alpha"])

            def with_option(option: Callable[..., Any], pairs: Pairs, otherwise: Any) -> Any:
                return option(pairs, **read_by(option, parameters)) if option in options else otherwise

            def compute(pairs: Pairs) -> dict[str, Tensor]:
                shaped = pairs
                for option in (desensitized, diverged, averaged):
                    shaped = with_option(option, shaped, shaped)
                values = formula(shaped, **read_by(formula, parameters))
                factor = with_option(policy_weights, pairs, None)
                nll = with_option(chosen_nll, pairs, None)
                terms = {name: values if factor is None else values * factor}
                return terms if nll is None else {**terms, "nll": nll}

            terms: dict[str, Per] = {name: "items"}
            if parameters["nll_weight"]:
                terms["nll"] = "chosen_tokens"
            return Bound(name, "pairs", scope_with(scope, parameters), _needs(reference, parameters), terms, compute)

        show_parameters(bind, [formula, *options], nll_weight=nll_weight)
        bind.__name__ = name
        bind.__doc__ = formula.__doc__
        LOSSES.register(name, scope, bind)
        return formula

    return add


def _needs(reference: bool, parameters: Mapping[str, Any]) -> frozenset[Need]:
    wanted: dict[Need, bool] = {
        "reference": reference,
        "margins": parameters.get("margin_weight", 0.0) > 0,
        "shared": parameters.get("ld_alpha", 1.0) < 1,
        "collision": parameters.get("wpo") == "sampled",
    }
    return frozenset(need for need, is_wanted in wanted.items() if is_wanted)


def h(pairs: Pairs) -> Tensor:
    """How much more the policy has come to prefer y_w over y_l than the reference does, `[P]`."""
    return pairs.chosen.ratio - pairs.rejected.ratio


def smoothed(z: Tensor, flip_rate: float) -> Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z): the cross-entropy of a label that is wrong with probability ε."""
    return -(1 - flip_rate) * logsigmoid(z) - flip_rate * logsigmoid(-z)


def offset(pairs: Pairs, weight: float) -> Tensor | float:
    """weight · margin of each pair as the data has it, `[P]`."""
    if weight == 0:
        return 0.0
    assert pairs.margins is not None
    return weight * pairs.margins


# ---- over h ----------------------------------------------------------------------------------------------------------


@pair_loss("sigmoid", divergence=True)
def sigmoid(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.0,
    length_penalty: NonNegative = 0.0,
    margin_weight: NonNegative = 0.0,
) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log σ(βh).

    With ε = label_smoothing it is conservative DPO (Mitchell 2023): -(1 - ε) log σ(z) - ε log σ(-z). R-DPO
    (arXiv 2403.19159) adds α(|y_w| - |y_l|) to βh, α = length_penalty: what length explains need not be learnt. DPO
    with an offset (arXiv 2402.10571) takes the margin of the data from it.
    """
    win, lose = pairs.chosen, pairs.rejected
    z = beta * h(pairs) + length_penalty * (win.tokens - lose.tokens) - offset(pairs, margin_weight)
    return smoothed(z, label_smoothing)


@pair_loss("robust", divergence=True)
def robust(pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Field(gt=0, lt=0.5)]) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [-(1 - ε) log σ(βh) + ε log σ(-βh)] / (1 - 2ε).

    Unbiased where a share ε = label_smoothing of the labels is flipped at random. It may be negative.
    """
    eps = label_smoothing
    return (-(1 - eps) * logsigmoid(beta * h(pairs)) + eps * logsigmoid(-beta * h(pairs))) / (1 - 2 * eps)


@pair_loss("ipo", divergence=True)
def ipo(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (h - 1/(2τ))², τ = beta; h of sums over tokens, as in the paper.

    With `length_normalized` h is a difference of averages, which is what TRL's `ipo` always does.
    """
    return (h(pairs) - 1 / (2 * beta)) ** 2


@pair_loss("hinge", divergence=True)
def hinge(pairs: Pairs, *, beta: Positive = 0.1, margin_weight: NonNegative = 0.0) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657): max(0, 1 + m - βh).

    m is the margin of the data times margin_weight.
    """
    return relu(1 + offset(pairs, margin_weight) - beta * h(pairs))


@pair_loss("exo_pair", divergence=True)
def exo_pair(
    pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, eq. 16): KL((σ(βh), σ(-βh)) ‖ (1 - ε, ε)), ε = label_smoothing."""
    z, eps = beta * h(pairs), label_smoothing
    return z.sigmoid() * (logsigmoid(z) - log1p(-eps)) + (-z).sigmoid() * (logsigmoid(-z) - log(eps))


@pair_loss("discopop", divergence=True)
def discopop(pairs: Pairs, *, beta: Positive = 0.1, tau: Positive = 0.05) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss (arXiv 2406.08414, eq. 5): (1 - m) log(1 + e^-z) + m e^-z.

    z = βh, m = σ(z/τ).
    """
    z = beta * h(pairs)
    # m e^-z in one exponent: for z of a very wrong pair m is 0 and e^-z infinite
    return -(-z / tau).sigmoid() * logsigmoid(z) + torch.exp(logsigmoid(z / tau) - z)


# ---- over the two ratios ---------------------------------------------------------------------------------------------


@pair_loss("nca_pair")
def nca_pair(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l), r = βρ."""
    win, lose = beta * pairs.chosen.ratio, beta * pairs.rejected.ratio
    return -logsigmoid(win) - 0.5 * logsigmoid(-win) - 0.5 * logsigmoid(-lose)


@pair_loss("sppo_hard")
def sppo_hard(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7; P = 1 and 0): (ρ_w - ½/β)² + (ρ_l + ½/β)²."""
    return (pairs.chosen.ratio - 0.5 / beta) ** 2 + (pairs.rejected.ratio + 0.5 / beta) ** 2


@pair_loss("apo_zero")
def apo_zero(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7, plus 1): 1 - σ(r_w) + σ(r_l); r = βρ.

    For chosen answers that are better than the policy's own.
    """
    return 1 - (beta * pairs.chosen.ratio).sigmoid() + (beta * pairs.rejected.ratio).sigmoid()


@pair_loss("apo_down")
def apo_down(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8, plus 1): σ(r_w) + 1 - σ(r_w - r_l); r = βρ.

    For chosen answers that are worse than the policy's own.
    """
    return (beta * pairs.chosen.ratio).sigmoid() + 1 - (beta * h(pairs)).sigmoid()


# ---- over the whole step ---------------------------------------------------------------------------------------------


@pair_loss("bco_pair", scope="step")
def bco_pair(pairs: Pairs, *, beta: Positive = 0.1, reward_shift: bool = True) -> Tensor:
    """BCO on pairs (arXiv 2404.04656): -log σ(r_w - δ) - log σ(-(r_l - δ)), r = βρ.

    δ = ½ (mean r_w + mean r_l) over the optimizer step, without gradient: the paper's reward shift, estimated from the
    step at hand where the paper keeps a running mean, so that nothing beyond the weights must be resumed. Without
    reward_shift δ = 0.
    """
    win, lose = beta * pairs.chosen.ratio, beta * pairs.rejected.ratio
    delta = 0.5 * (win.mean() + lose.mean()).detach() if reward_shift else 0.0
    return -logsigmoid(win - delta) - logsigmoid(delta - lose)


@pair_loss("aot", scope="step", weights=False)
def aot(pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.0) -> Tensor:
    """AOT, paired (arXiv 2406.05882): DPO between the sorted log-odds of policy and of reference.

    The k-th smallest log π(y_w)/π(y_l) of the step meets the k-th smallest log π_ref(y_w)/π_ref(y_l), so that the
    one distribution comes to lie above the other. Value k belongs to rank k, not to pair k.
    """
    win, lose = pairs.chosen, pairs.rejected
    assert win.reference is not None and lose.reference is not None
    policy = (win.policy - lose.policy).sort(stable=True).values
    reference = (win.reference - lose.reference).sort(stable=True).values
    return smoothed(beta * (policy - reference), label_smoothing)


@pair_loss("aot_unpaired", scope="step", weights=False)
def aot_unpaired(pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.0) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): DPO between the sorted ratios of chosen and of rejected answers.

    Value k belongs to rank k, not to pair k.
    """
    win = pairs.chosen.ratio.sort(stable=True).values
    lose = pairs.rejected.ratio.sort(stable=True).values
    return smoothed(beta * (win - lose), label_smoothing)


# ---- without a reference ---------------------------------------------------------------------------------------------


@pair_loss("simpo", reference=False)
def simpo(pairs: Pairs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): -log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ)."""
    win, lose = pairs.chosen, pairs.rejected
    return -logsigmoid(beta * (win.policy / win.tokens - lose.policy / lose.tokens) - gamma)


@pair_loss("cpo", reference=False, nll_weight=1.0)
def cpo(pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.0) -> Tensor:
    """CPO (arXiv 2401.08417): -log σ(β log π(y_w) - β log π(y_l)), beside the NLL term of weight 1."""
    return smoothed(beta * (pairs.chosen.policy - pairs.rejected.policy), label_smoothing)


@pair_loss("orpo", reference=False, nll_weight=1.0)
def orpo(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6-7): -λ log σ(log odds(y_w) - log odds(y_l)), beside the NLL term of weight 1.

    odds(y) = P/(1 - P), P = exp mean_t log π(y_t); λ = beta.
    """

    def log_odds(mean: Tensor) -> Tensor:
        mean = mean.clamp(max=-1e-6)  # a probability that rounds to 1 has infinite odds, and no finite gradient
        return mean - torch.log(-torch.expm1(mean))

    win, lose = pairs.chosen, pairs.rejected
    return -beta * logsigmoid(log_odds(win.policy / win.tokens) - log_odds(lose.policy / lose.tokens))


# ---- mixtures --------------------------------------------------------------------------------------------------------


def mixture(*, losses: Annotated[list[dict[str, Any]], Field(min_length=2)], nll_weight: NonNegative = 0.0) -> Bound:
    """Σ_i weight_i · loss_i, each a term of its own, and one NLL term that adds up theirs and `nll_weight`.

    In a recipe: `losses: [{type: sigmoid, weight: 0.8, beta: 0.1}, {type: bco_pair, weight: 0.2}]`, as in MPO
    (arXiv 2411.10442; with nll_weight 1).
    """
    parts = [_part(i, part) for i, part in enumerate(losses)]
    seen = [bound.name for bound, _ in parts]
    times = [seen[: i + 1].count(name) for i, name in enumerate(seen)]
    names = [name if n == 1 else f"{name}_{n}" for name, n in zip(seen, times, strict=True)]

    def compute(pairs: Pairs) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        nll = chosen_nll(pairs, nll_weight=nll_weight)
        for name, (bound, weight) in zip(names, parts, strict=True):
            values = bound(pairs)
            terms[name] = weight * values[bound.name]
            if "nll" in values:
                nll = weight * values["nll"] + (0.0 if nll is None else nll)
        return terms if nll is None else {**terms, "nll": nll}

    terms: dict[str, Per] = dict.fromkeys(names, "items")
    if nll_weight or any("nll" in bound.terms for bound, _ in parts):
        terms["nll"] = "chosen_tokens"
    scope: Scope = "step" if any(bound.scope == "step" for bound, _ in parts) else "pair"
    return Bound("mixture", "pairs", scope, frozenset[Need]().union(*(b.needs for b, _ in parts)), terms, compute)


def _part(i: int, part: Mapping[str, Any]) -> tuple[Bound, float]:
    """One loss of a mixture and its weight."""
    where = f"loss 'mixture': losses[{i}]"
    parameters = dict(part)
    name, weight = parameters.pop("type", None), parameters.pop("weight", 1.0)
    if not isinstance(name, str) or name == "mixture":
        raise RecipeError(f"{where}: type={name!r}: give the name of a loss that is no mixture")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise RecipeError(f"{where}: weight={weight!r}: give a number greater than 0")
    try:
        bound = resolve(name, parameters)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if bound.items != "pairs":
        raise RecipeError(f"{where}: '{name}' is a loss over unpaired answers; a mixture is over pairs")
    return bound, float(weight)


LOSSES.register("mixture", "step", mixture)
for _name, (_scope, _bind) in UNPAIRED.items():
    LOSSES.register(_name, _scope, _bind)
