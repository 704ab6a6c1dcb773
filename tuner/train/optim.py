"""Trainable parameters -> parameter groups, an optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.model import quantize

if TYPE_CHECKING:
    from tuner.recipe import TrainSection

BETAS = (0.9, 0.999)
EPS = 1e-8


def parameter_groups(module: nn.Module, weight_decay: float) -> tuple[list[dict[str, object]], dict[str, list[str]]]:
    """AdamW's groups and the names in each, for the manifest.

    Weight decay applies to matrices. Norms, biases, DoRA magnitudes and embeddings are left alone: the embedding rows
    of tokens that a step does not hold would shrink with nothing to pull them back.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    names: dict[str, list[str]] = {"decay": [], "no_decay": []}
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = weight_decay > 0 and parameter.ndim >= 2 and id(parameter) not in embeddings
            kind = "decay" if decays else "no_decay"
            names[kind].append(name)
            groups[kind].append(parameter)
    decay = {"decay": weight_decay, "no_decay": 0.0}
    return [{"params": groups[k], "weight_decay": decay[k]} for k in groups if groups[k]], names


def build_optimizer(module: nn.Module, train: TrainSection, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the recipe names; `adamw_torch` is torch's fused AdamW (arXiv:1711.05101)."""
    groups, _ = parameter_groups(module, train.weight_decay)
    if train.optim == "adamw_torch":
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=BETAS, eps=EPS, fused=True)
    return quantize.optimizer(train.optim, groups, device, lr=train.learning_rate, betas=BETAS, eps=EPS)


def schedule(train: TrainSection, num_steps: int) -> Callable[[int], float]:
    """Step (0-based) -> learning rate.

    With w warm-up steps of n in all: lr(t) = peak (t + 1) / w while t < w, so the first step already learns; then
    with x = (t - w) / (n - w) in [0, 1), `linear` is 1 - x and `cosine` (1 + cos(pi x)) / 2 of the way from the floor
    (`min_lr_ratio` of the peak) to the peak, so the last step still learns. The floor would be reached at step n.
    """
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * num_steps)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    }
    shape, floor, peak = shapes[train.lr_scheduler_type], train.min_lr_ratio, train.learning_rate

    def at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (floor + (1.0 - floor) * shape((step - warmup) / max(1, num_steps - warmup)))

    return at


def heeds_flags(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves its update out where its `found_inf` is 1, a flag that lies on the device.

    torch's fused ones do, so that gradient scalers need not wait for the device; those of bitsandbytes do not.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class Guard:
    """Keeps what is not finite away from the weights without asking the host: the update of such a step is left out,
    and after `patience` of them in a row all that follow, so that the weights stay those of the last finite step.

    Args:
        in_a_row: how many there were before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, patience: int, in_a_row: int, device: torch.device) -> None:
        self._optimizer, self._patience = optimizer, patience
        self._in_a_row = torch.full((), float(in_a_row), device=device)
        self._ended = torch.zeros((), dtype=torch.bool, device=device)

    def hold(self, finite: Tensor) -> None:
        """Says whether the next update is one to leave out; `finite` is a boolean scalar on the device."""
        self._in_a_row = torch.where(finite, 0.0, self._in_a_row + 1)
        self._ended = self._ended | (self._in_a_row >= self._patience)
        self._optimizer.found_inf = (self._ended | ~finite).float()  # type: ignore[attr-defined]


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their total norm is at most `max_norm` (0: leaves them); returns the norm before."""
    held = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm
