"""Preference and reward losses are those of TRL 1.16, called on given log-probs; where they differ, which and why.

TRL's loss methods run as they are: only the model, which would make the log-probs, is a stub that returns ours, one
answer a row and one log-prob a token.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tuner.losses import preference, reward
from tuner.types import Pairs, Ranked, Scored, Unpaired

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under TRL

COUNT, LONGEST = 10, 12


class Answers:
    """Log-probs token by token, [2 * COUNT, LONGEST]; the chosen answers first, as TRL lays them. 0 where no token."""

    def __init__(self, seed: int = 0, spread: float = 1.0) -> None:
        g = torch.Generator().manual_seed(seed)
        shape = (2 * COUNT, LONGEST)
        self.lengths = torch.randint(1, LONGEST + 1, (2 * COUNT,), generator=g)
        self.mask = torch.arange(LONGEST) < self.lengths[:, None]
        self.reference = (-3 * torch.rand(shape, generator=g) - 0.1) * self.mask
        policy = self.reference + spread * torch.randn(shape, generator=g)
        self.policy = policy.clamp(max=-0.01).requires_grad_()
        self.collision = (-2 * torch.rand(shape, generator=g)) * self.mask

    @property
    def logps(self) -> Tensor:
        return self.policy * self.mask

    @property
    def pairs(self) -> Pairs:
        lengths = self.lengths.chunk(2)
        shared = torch.arange(LONGEST) < torch.minimum(*lengths).repeat(2)[:, None]
        columns = [
            self.logps.sum(1),
            self.lengths,
            self.reference.sum(1),
            (self.logps * shared).sum(1),
            (self.reference * shared).sum(1),
            self.collision.sum(1),
        ]
        chosen, rejected = zip(*(column.chunk(2) for column in columns), strict=True)
        return Pairs(Scored(*chosen), Scored(*rejected))


class Accelerator:
    """One process on a CPU."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def unwrap_model(self, model: object) -> object:
        return model

    def autocast(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class Stub(nn.Module):
    """Stands for a model with TRL's fused head: returns given log-probs, whatever it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, collision: Tensor | None = None) -> None:
        super().__init__()
        zeros = torch.zeros_like(log_probs).detach()
        self.output = SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=collision, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def forward(self, **_: object) -> SimpleNamespace:
        return self.output


def trainer(kind: type, **attributes: object) -> Any:
    """A TRL trainer that has been given nothing but what its loss reads."""
    found = kind.__new__(kind)
    found.accelerator = Accelerator()
    found._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    found._total_train_tokens = 0
    found._tp_size = 1
    found.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def trl_dpo(answers: Answers, loss_types: list[str], weights: list[float] | None = None, **options: Any) -> Tensor:
    """The loss of TRL's DPOTrainer, the mean over pairs."""
    ld_alpha = options.get("ld_alpha")
    tau = options.get("discopop_tau", 0.05)
    dpo = trainer(
        DPOTrainer,
        model=Stub(answers.logps, answers.collision),
        ref_model=Stub(answers.reference),
        precompute_ref_logps=False,
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=ld_alpha,
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        use_weighting=options.get("use_weighting", False),
        args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
    )
    mask = torch.cat([torch.zeros(2 * COUNT, 1), answers.mask], 1).long()  # one token of prompt
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return dpo._compute_loss(dpo.model, inputs, False)


def ours(answers: Answers, name: str, parameters: dict[str, object]) -> Tensor:
    """Our loss of a step of COUNT pairs: each term's sum over its denominator."""
    loss = preference.resolve(name, parameters)
    counts = loss.denominators(COUNT, float(answers.lengths[:COUNT].sum()))
    return torch.stack([values.sum() / counts[term] for term, values in loss(answers.pairs).items()]).sum()


def check(found: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    """Losses equal to 1e-6 and gradients of every log-prob to 1e-5, relative to the largest."""
    mine, other = torch.autograd.grad(found, leaf)[0], torch.autograd.grad(theirs, leaf)[0]
    assert float(found.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert float(other.abs().max()) > 0
    assert float((mine - other).abs().max()) <= 1e-5 * float(other.abs().max())


# A label -> (our loss, our parameters, TRL's loss types, TRL's options): equal as they stand.
EQUAL: dict[str, tuple[str, dict[str, object], list[str], dict[str, object]]] = {
    "sigmoid": ("sigmoid", {"beta": 0.3}, ["sigmoid"], {"beta": 0.3}),
    "hinge": ("hinge", {}, ["hinge"], {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.01}, ["exo_pair"], {"label_smoothing": 0.01}),
    "nca_pair": ("nca_pair", {}, ["nca_pair"], {}),
    "robust": ("robust", {"label_smoothing": 0.2}, ["robust"], {"label_smoothing": 0.2}),
    "sppo_hard": ("sppo_hard", {"beta": 0.25}, ["sppo_hard"], {"beta": 0.25}),
    "aot": ("aot", {"label_smoothing": 0.1}, ["aot"], {"label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired", {}, ["aot_unpaired"], {}),
    "apo_zero": ("apo_zero", {}, ["apo_zero"], {}),
    "apo_down": ("apo_down", {}, ["apo_down"], {}),
    "discopop": ("discopop", {"tau": 0.1}, ["discopop"], {"discopop_tau": 0.1}),
    "bco_pair": ("bco_pair", {"reward_shift": False}, ["bco_pair"], {}),
    "ld-dpo": ("sigmoid", {"ld_alpha": 0.4}, ["sigmoid"], {"ld_alpha": 0.4}),
    "ld-aot": ("aot", {"ld_alpha": 0.4}, ["aot"], {"ld_alpha": 0.4}),
    "forward_kl": ("sigmoid", {"f_divergence": "forward_kl"}, ["sigmoid"], {"f_divergence_type": "forward_kl"}),
    "js": ("hinge", {"f_divergence": "js"}, ["hinge"], {"f_divergence_type": "js_divergence"}),
    "wpo": ("sigmoid", {"wpo": "sampled"}, ["sigmoid"], {"use_weighting": True}),
    "nll": ("sigmoid", {"nll_weight": 0.2}, ["sigmoid", "sft"], {"weights": [1.0, 0.2]}),
    "mixture": (
        "mixture",
        {
            "losses": [
                {"type": "sigmoid", "weight": 0.8},
                {"type": "bco_pair", "weight": 0.2, "reward_shift": False},
                {"type": "aot"},
            ],
            "nll_weight": 1.0,
        },
        ["sigmoid", "bco_pair", "aot", "sft"],
        {"weights": [0.8, 0.2, 1.0, 1.0]},
    ),
}


@pytest.mark.parametrize("label", EQUAL)
def test_equal(label: str) -> None:
    answers = Answers()
    name, parameters, loss_types, options = EQUAL[label]
    check(ours(answers, name, parameters), trl_dpo(answers, loss_types, **options), answers.policy)  # type: ignore[arg-type]


def differs(found: Tensor, theirs: Tensor) -> bool:
    return abs(float(found.detach()) - float(theirs.detach())) > 1e-3 * abs(float(theirs.detach()))


def test_trl_ignores_label_smoothing_for_sigmoid() -> None:
    answers = Answers()
    theirs = trl_dpo(answers, ["sigmoid"], label_smoothing=0.3)
    assert float(theirs.detach()) == float(trl_dpo(answers, ["sigmoid"]).detach())
    assert differs(ours(answers, "sigmoid", {"label_smoothing": 0.3}), theirs)
    one = Answers()
    h = (one.logps - one.reference).sum(1)
    smoothed = (
        0.7 * -(0.1 * (h[:COUNT] - h[COUNT:])).sigmoid().log() - 0.3 * (-0.1 * (h[:COUNT] - h[COUNT:])).sigmoid().log()
    )
    check(ours(one, "sigmoid", {"label_smoothing": 0.3}), smoothed.mean(), one.policy)


def test_trl_averages_ipo_over_tokens_where_the_paper_sums() -> None:
    answers = Answers()
    theirs = trl_dpo(answers, ["ipo"], beta=0.2)
    check(ours(answers, "ipo", {"beta": 0.2, "length_normalized": True}), theirs, answers.policy)
    assert differs(ours(answers, "ipo", {"beta": 0.2}), theirs)


def test_sigmoid_norm_is_length_normalised_sigmoid() -> None:
    answers = Answers()
    theirs = trl_dpo(answers, ["sigmoid_norm"], beta=5.0)
    check(ours(answers, "sigmoid", {"beta": 5.0, "length_normalized": True}), theirs, answers.policy)
    theirs = trl_dpo(answers, ["sigmoid_norm"], beta=5.0, f_divergence_type="js_divergence")
    parameters = {"beta": 5.0, "length_normalized": True, "f_divergence": "js"}
    check(ours(answers, "sigmoid", parameters), theirs, answers.policy)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_trl_counts_alpha_from_the_other_end(alpha: float) -> None:
    # The paper's alpha runs from reverse (0) to forward KL (1); TRL's coefficient is 1 - alpha.
    answers = Answers(spread=0.3)
    theirs = trl_dpo(answers, ["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)
    check(ours(answers, "sigmoid", {"f_divergence": "alpha", "f_alpha": alpha}), theirs, answers.policy)


def test_trl_has_no_reward_shift_in_bco() -> None:
    answers = Answers()
    assert differs(ours(answers, "bco_pair", {"beta": 1.0}), trl_dpo(answers, ["bco_pair"], beta=1.0))


def test_trl_discopop_of_a_very_wrong_pair_is_nan() -> None:
    answers = Answers()
    with torch.no_grad():
        answers.policy[:COUNT] -= 150 * answers.mask[:COUNT]
    assert torch.isnan(trl_dpo(answers, ["discopop"]))
    found = ours(answers, "discopop", {})
    assert torch.isfinite(found) and torch.isfinite(torch.autograd.grad(found, answers.policy)[0]).all()


def test_trl_cannot_add_its_nll_to_a_weighted_loss() -> None:
    # It multiplies the expanded NLL in place. In ours WPO weighs the preference; the NLL term is none.
    answers = Answers()
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(answers, ["sigmoid", "sft"], [1.0, 0.2], use_weighting=True)
    weighted = trl_dpo(answers, ["sigmoid"], use_weighting=True) + trl_dpo(answers, ["sft"], [0.2])
    check(ours(answers, "sigmoid", {"wpo": "sampled", "nll_weight": 0.2}), weighted, answers.policy)


@pytest.mark.parametrize("label", ["sigmoid", "robust", "exo_pair", "aot", "ld-dpo", "wpo", "nll", "discopop"])
def test_mutant_another_number_is_noticed(label: str) -> None:
    answers = Answers()
    name, parameters, loss_types, options = EQUAL[label]
    number = next(
        key for key in ("tau", "ld_alpha", "nll_weight", "label_smoothing", "beta", "wpo") if key in parameters
    )
    wrong = {**parameters, number: "plain" if number == "wpo" else 1.01 * float(str(parameters[number]))}
    with pytest.raises(AssertionError):
        check(ours(answers, name, wrong), trl_dpo(answers, loss_types, **options), answers.policy)  # type: ignore[arg-type]


# ---- KTO -------------------------------------------------------------------------------------------------------------


def trl_kto(answers: Answers, mismatched: Answers, label: Tensor, **options: float) -> Tensor:
    kto = trainer(
        KTOTrainer,
        model=Stub(answers.logps),
        ref_model=Stub(answers.reference),
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=options.get("beta", 0.1),
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    kl_logps = mismatched.logps.detach().sum(1)
    kto._compute_kl_logps = lambda model, batch: kl_logps
    mask = torch.cat([torch.zeros(2 * COUNT, 1), answers.mask], 1).long()
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": label,
        "ref_logps": answers.reference.sum(1),
        "ref_KL_logps": mismatched.reference.sum(1),
    }
    return kto._compute_loss(kto.model, inputs, False)


def unpaired(answers: Answers, mismatched: Answers, label: Tensor) -> Unpaired:
    def scored(of: Answers) -> Scored:
        return Scored(of.logps.sum(1), of.lengths, of.reference.sum(1))

    return Unpaired(scored(answers), label, scored(mismatched))


@pytest.mark.parametrize("upwards", [1.0, -1.0], ids=["positive KL", "KL at its bound"])
def test_kto(upwards: float) -> None:
    answers, mismatched = Answers(), Answers(1)
    with torch.no_grad():
        mismatched.policy.copy_(mismatched.reference + upwards * 0.1 * mismatched.mask)
    label = torch.tensor([True, False, False, True, False] * 4)
    weights = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    loss = preference.resolve("kto", weights)

    def found() -> Tensor:
        return loss(unpaired(answers, mismatched, label))["kto"].mean()

    check(found(), trl_kto(answers, mismatched, label, **weights), answers.policy)
    with pytest.raises(AssertionError):  # a mutant: the labels the other way round
        check(found(), trl_kto(answers, mismatched, ~label, **weights), answers.policy)


# ---- without a reference ---------------------------------------------------------------------------------------------


def trl_cpo(answers: Answers, averaged: bool, **options: Any) -> Tensor:
    lengths = answers.lengths if averaged else 1
    cpo = trainer(CPOTrainer, **{"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, **options})
    losses, _, _ = cpo.cpo_loss(*(answers.logps.sum(1) / lengths).chunk(2))
    return losses.mean()


def test_cpo_and_simpo() -> None:
    answers = Answers()
    theirs = trl_cpo(answers, averaged=False, loss_type="sigmoid", beta=0.2, label_smoothing=0.1)
    check(ours(answers, "cpo", {"beta": 0.2, "label_smoothing": 0.1, "nll_weight": 0}), theirs, answers.policy)
    theirs = trl_cpo(answers, averaged=True, loss_type="simpo", beta=2.5, simpo_gamma=1.4)
    check(ours(answers, "simpo", {"beta": 2.5, "gamma": 1.4}), theirs, answers.policy)


def test_orpo() -> None:
    # TRL adds an NLL over prompt and answer; ours, as SFT everywhere here, is over the answer.
    answers = Answers()
    orpo = trainer(ORPOTrainer, beta=0.2)
    gains = orpo.odds_ratio_loss(*(answers.logps.sum(1) / answers.lengths).chunk(2))[0]
    check(ours(answers, "orpo", {"beta": 0.2, "nll_weight": 0}), -gains.mean(), answers.policy)


# ---- reward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margins", [None, torch.arange(COUNT) / 4.0], ids=["plain", "margin"])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_reward(margins: Tensor | None, centring: float | None) -> None:
    rewards = torch.randn(2 * COUNT, 1, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model = Stub(rewards)
    model.output.logits = rewards
    stub = trainer(RewardTrainer, model=model, args=SimpleNamespace(center_rewards_coefficient=centring))
    inputs = {"attention_mask": torch.ones(2 * COUNT, 3)}
    theirs = stub.compute_loss(model, inputs if margins is None else {**inputs, "margin": margins})
    parameters = {"margin_weight": 0.0 if margins is None else 1.0, "centring": centring or 0.0}
    pairs = Ranked(torch.stack(rewards[:, 0].chunk(2), 1), torch.full((COUNT,), 2), margins)
    values = reward.resolve("bradley_terry", parameters)(pairs)
    check(torch.stack([value.mean() for value in values.values()]).sum(), theirs, rewards)
