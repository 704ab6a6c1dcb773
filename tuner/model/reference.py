"""A policy at the first step -> the reference of preference losses: the same log-probs, whatever the policy learns.

Nothing is loaded a second time. Where the adapter starts at zero on an untouched base, the reference is the pass
without it. Everywhere else (full weights, PiSSA, an adapter that is continued) the trainable weights are copied at the
start, and change places with the trained ones for the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch import Tensor, nn

from tuner.model.adapted import is_adapted, starts_off_zero
from tuner.model.policy import Policy
from tuner.types import Batch


class Reference:
    """A frozen policy: log-probs without gradient and without dropout.

    Args:
        policy: the policy before its first step, or another model that never trains.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._adapters = _adapters(policy) if _starts_at_zero(policy) else []
        trained = [] if self._adapters else [p for p in policy.parameters() if p.requires_grad]
        self._start = [(p, p.detach().clone()) for p in trained]

    @property
    def copied_bytes(self) -> int:
        """What the copy of the starting weights takes."""
        return sum(kept.numel() * kept.element_size() for _, kept in self._start)

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probability of each target of the batch, `[M]` float32."""
        training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad(), self._as_it_was():
                return self.policy(batch)
        finally:
            self.policy.train(training)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        now = [parameter.data for parameter, _ in self._start]
        try:
            for adapter in self._adapters:
                adapter._disable_adapters = True  # peft's own switch also turns requires_grad off and on again
            for parameter, kept in self._start:
                parameter.data = kept
            yield
        finally:
            for (parameter, _), data in zip(self._start, now, strict=True):
                parameter.data = data
            for adapter in self._adapters:
                adapter._disable_adapters = False


def _adapters(policy: Policy) -> list[lora.layer.LoraLayer]:
    return [m for m in policy.modules() if isinstance(m, lora.layer.LoraLayer)]


def _starts_at_zero(policy: Policy) -> bool:
    """Whether the policy without its adapter is, to the bit, the policy with it."""
    if not is_adapted(policy.lm) or starts_off_zero(policy.lm):
        return False
    ups = {id(up.weight) for m in _adapters(policy) for up in m.lora_B.values()}
    downs = {id(down.weight) for m in _adapters(policy) for down in m.lora_A.values()}
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in ups:
            if parameter.any():
                return False
        elif id(parameter) not in downs:
            return False  # DoRA's magnitudes, or modules trained in full
    return True


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to zero, also the functional one of attention, so that policy and reference differ by what was
    learned alone. What is saved says so too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  of transformers' attention layers
    if is_adapted(model):
        for config in model.peft_config.values():
            config.lora_dropout = 0.0
