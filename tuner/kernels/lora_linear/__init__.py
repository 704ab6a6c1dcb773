"""Linears with a frozen base and an adapter, those on one input as one autograd node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Base(Protocol):
    """A frozen linear, read in the forward and once more in the backward instead of being kept."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]` in `dtype`; dequantised anew if it is 4-bit, and then good until the next weight is asked for."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """`[out]` in `dtype`, if there is one."""


@dataclass(frozen=True)
class Adapter:
    """The low-rank change of a linear: scaling * B A, which reads an input of which `dropout` is dropped."""

    a: Tensor  # [r, in], fp32 master
    b: Tensor  # [out, r], fp32 master
    scaling: float
    dropout: float = 0.0
