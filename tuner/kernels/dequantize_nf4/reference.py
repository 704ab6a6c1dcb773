"""NF4 (or FP4) weights -> plain ones, in plain torch (QLoRA, arXiv:2305.14314 section 3).

    w[i] = code[q[i]] * scale[i // blocksize]

q are 4-bit numbers, two a byte, the first in the high half. With double quantisation the scales are 8-bit numbers
themselves: scale[j] = nested.code[s[j]] * nested.scale[j // nested.blocksize] + nested.offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nested:
    """How the scales of the weights are quantised."""

    code: Tensor  # [256] float32
    scale: Tensor  # [ceil(scales / blocksize)] float32
    offset: Tensor  # [] float32
    blocksize: int


def dequantize_nf4(
    packed: Tensor,
    scale: Tensor,
    code: Tensor,
    *,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: Nested | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weight `shape` in `dtype`.

    Args:
        packed: uint8, two weights a byte.
        scale: `[ceil(weights / blocksize)]` float32; with `nested` uint8.
        code: `[16]` float32, what each 4-bit number stands for.
        out: where to write it, `shape` in `dtype`; a new tensor without.
    """
    if nested is not None:
        wide = nested.scale.repeat_interleave(nested.blocksize)[: scale.numel()]
        scale = nested.code[scale.flatten().int()] * wide + nested.offset
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=-1)
    weights = code[halves.int()].view(-1)
    pad = -weights.numel() % blocksize
    scaled = torch.nn.functional.pad(weights, (0, pad)).view(-1, blocksize) * scale.flatten()[:, None]
    result = scaled.view(-1)[: shape[0] * shape[1]].view(shape)
    return result.to(dtype) if out is None else out.copy_(result)
