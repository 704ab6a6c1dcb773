"""The losses written out in float64 from their papers, in the plainest form, to be compared with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.types import Pairs, Scored


@dataclass(frozen=True, eq=False)
class Numbers:
    """Log-probs of pairs: chosen (w) and rejected (l), policy and reference (r), tokens (t), margins (m). All `[P]`."""

    w: Tensor
    l: Tensor  # noqa: E741
    rw: Tensor
    rl: Tensor
    tw: Tensor
    tl: Tensor
    m: Tensor

    @property
    def h(self) -> Tensor:
        return (self.w - self.rw) - (self.l - self.rl)


def numbers(count: int = 24, seed: int = 0) -> Numbers:
    """Random log-probs that float32 holds exactly, so that only the arithmetic of a loss can be off."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=g).double()

    def moves() -> Tensor:  # all different: a sort must not meet ties, whose order is free
        return (torch.randperm(400, generator=g)[:count].double() - 200) / 64

    rw, rl = draw(-4000, -300) / 64, draw(-4000, -300) / 64
    return Numbers(rw + moves(), rl + moves(), rw, rl, draw(2, 40), draw(2, 40), draw(0, 4) / 2)


def pairs_of(n: Numbers, dtype: torch.dtype = torch.float32) -> Pairs:
    """The same numbers as a stage would bring them, with gradient on the policy's."""

    def side(policy: Tensor, reference: Tensor, tokens: Tensor) -> Scored:
        return Scored(policy.to(dtype).requires_grad_(), tokens.long(), reference.to(dtype))

    return Pairs(side(n.w, n.rw, n.tw), side(n.l, n.rl, n.tl), n.m.to(dtype))


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference."""
    return float((ours.detach().double() - theirs.detach()).abs().max())


def s(x: Tensor) -> Tensor:
    """The logistic function."""
    return 1 / (1 + torch.exp(-x))


def ls(x: Tensor) -> Tensor:
    """log σ(x)."""
    return -torch.log(1 + torch.exp(-x))


def _orpo(n: Numbers) -> Tensor:
    p, q = torch.exp(n.w / n.tw), torch.exp(n.l / n.tl)
    return -0.2 * torch.log(s(torch.log((p / (1 - p)) / (q / (1 - q)))))


def _aot(n: Numbers) -> Tensor:
    d = torch.sort(n.w - n.l).values - torch.sort(n.rw - n.rl).values
    return -0.9 * ls(0.1 * d) - 0.1 * ls(-0.1 * d)


def _aot_unpaired(n: Numbers) -> Tensor:
    d = torch.sort(n.w - n.rw).values - torch.sort(n.l - n.rl).values
    return -0.8 * ls(0.1 * d) - 0.2 * ls(-0.1 * d)


def _bco_pair(n: Numbers) -> Tensor:
    r, q = 0.1 * (n.w - n.rw), 0.1 * (n.l - n.rl)
    d = float((r.mean() + q.mean()).detach() / 2)
    return -ls(r - d) - ls(-(q - d))


def _exo(n: Numbers) -> Tensor:
    p = s(0.1 * n.h)
    return p * torch.log(p / 0.99) + (1 - p) * torch.log((1 - p) / 0.01)


def _alpha(n: Numbers) -> Tensor:
    u, v = torch.exp(n.w - n.rw), torch.exp(n.l - n.rl)
    return -ls(0.1 * ((1 - u**-0.3) / 0.3 - (1 - v**-0.3) / 0.3))


def _forward_kl(n: Numbers) -> Tensor:
    return (-torch.exp(n.rw - n.w) + torch.exp(n.rl - n.l) - 5) ** 2


def _js(n: Numbers) -> Tensor:
    u, v = torch.exp(n.w - n.rw), torch.exp(n.l - n.rl)
    return torch.clamp(1 - 0.1 * (torch.log(2 * u / (1 + u)) - torch.log(2 * v / (1 + v))), min=0)


def _wpo(n: Numbers) -> Tensor:
    weight = torch.exp(n.w / n.tw).detach() * torch.exp(n.l / n.tl).detach()
    return -weight * ls(0.1 * n.h)


Form = Callable[[Numbers], Tensor]

# A label -> (name, parameters, the formula). Every loss over pairs occurs, and every parameter of each.
FORMS: dict[str, tuple[str, dict[str, object], Form]] = {
    "dpo": ("sigmoid", {"beta": 0.3}, lambda n: -ls(0.3 * n.h)),
    "cdpo": ("sigmoid", {"label_smoothing": 0.2}, lambda n: -0.8 * ls(0.1 * n.h) - 0.2 * ls(-0.1 * n.h)),
    "r-dpo": ("sigmoid", {"length_penalty": 0.05}, lambda n: -ls(0.1 * n.h + 0.05 * (n.tw - n.tl))),
    "offset dpo": ("sigmoid", {"margin_weight": 2.0}, lambda n: -ls(0.1 * n.h - 2 * n.m)),
    "length-normalised dpo": (
        "sigmoid",
        {"length_normalized": True, "beta": 5.0},
        lambda n: -ls(5 * ((n.w - n.rw) / n.tw - (n.l - n.rl) / n.tl)),
    ),
    "f-dpo alpha": ("sigmoid", {"f_divergence": "alpha", "f_alpha": 0.3}, _alpha),
    "f-ipo forward kl": ("ipo", {"f_divergence": "forward_kl"}, _forward_kl),
    "f-hinge js": ("hinge", {"f_divergence": "js"}, _js),
    "wpo": ("sigmoid", {"wpo": "plain"}, _wpo),
    "robust": (
        "robust",
        {"label_smoothing": 0.1},
        lambda n: (-0.9 * ls(0.1 * n.h) + 0.1 * ls(-0.1 * n.h)) / 0.8,
    ),
    "ipo": ("ipo", {"beta": 0.2}, lambda n: (n.h - 2.5) ** 2),
    "ipo of averages": (
        "ipo",
        {"beta": 0.2, "length_normalized": True},
        lambda n: ((n.w - n.rw) / n.tw - (n.l - n.rl) / n.tl - 2.5) ** 2,
    ),
    "hinge": ("hinge", {}, lambda n: torch.clamp(1 - 0.1 * n.h, min=0)),
    "hinge with margin": ("hinge", {"margin_weight": 1.0}, lambda n: torch.clamp(1 + n.m - 0.1 * n.h, min=0)),
    "exo": ("exo_pair", {"label_smoothing": 0.01}, _exo),
    "discopop": (
        "discopop",
        {"tau": 0.5},
        lambda n: (1 - s(0.1 * n.h / 0.5)) * -ls(0.1 * n.h) + s(0.1 * n.h / 0.5) * torch.exp(-0.1 * n.h),
    ),
    "nca": (
        "nca_pair",
        {},
        lambda n: -ls(0.1 * (n.w - n.rw)) - 0.5 * ls(-0.1 * (n.w - n.rw)) - 0.5 * ls(-0.1 * (n.l - n.rl)),
    ),
    "sppo": ("sppo_hard", {"beta": 0.25}, lambda n: (n.w - n.rw - 2) ** 2 + (n.l - n.rl + 2) ** 2),
    "apo zero": ("apo_zero", {}, lambda n: 1 - s(0.1 * (n.w - n.rw)) + s(0.1 * (n.l - n.rl))),
    "apo down": ("apo_down", {}, lambda n: s(0.1 * (n.w - n.rw)) + 1 - s(0.1 * n.h)),
    "bco": ("bco_pair", {}, _bco_pair),
    "bco unshifted": (
        "bco_pair",
        {"reward_shift": False},
        lambda n: -ls(0.1 * (n.w - n.rw)) - ls(-0.1 * (n.l - n.rl)),
    ),
    "aot": ("aot", {"label_smoothing": 0.1}, _aot),
    "aot unpaired": ("aot_unpaired", {"label_smoothing": 0.2}, _aot_unpaired),
    "simpo": ("simpo", {"beta": 2.5, "gamma": 1.4}, lambda n: -ls(2.5 * n.w / n.tw - 2.5 * n.l / n.tl - 1.4)),
    "cpo": (
        "cpo",
        {"label_smoothing": 0.1},
        lambda n: -0.9 * ls(0.1 * (n.w - n.l)) - 0.1 * ls(-0.1 * (n.w - n.l)),
    ),
    "orpo": ("orpo", {"beta": 0.2}, _orpo),
}
