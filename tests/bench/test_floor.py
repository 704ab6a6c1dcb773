"""FLOPs and the floor: the counts of an 8B as published, and less work where less is asked for."""

from __future__ import annotations

import pytest
import torch
from floor import floor, model_flops, pairs_seen
from models import SHAPES

CPU = torch.device("cpu")


def test_the_flops_of_an_8b_are_those_of_the_convention() -> None:
    """Llama 3 8B at 4,096 tokens: 16.08 GFLOP a token forward, three times that in full, about two thirds for LoRA."""
    tokens, lengths = 4096, [4096]
    full = model_flops(SHAPES["8b"], tokens, tokens, lengths, None) / tokens
    lora = model_flops(SHAPES["8b"], tokens, tokens, lengths, 16) / tokens
    assert full == pytest.approx(48.25e9, rel=2e-3)
    assert lora == pytest.approx(32.25e9, rel=3e-3)
    assert SHAPES["8b"].lora_parameters(16) == 41_943_040


def test_what_is_skipped_earns_no_credit() -> None:
    shape = SHAPES["tiny"]
    whole = model_flops(shape, 64, 64, [64], 16)
    assert pairs_seen([32, 32]) < pairs_seen([64]) == 64 * 65 // 2
    assert model_flops(shape, 64, 64, [32, 32], 16) < whole
    assert model_flops(shape, 64, 16, [64], 16) < whole


def test_the_floor_counts_the_weight_gradient_only_where_it_trains() -> None:
    shape = SHAPES["tiny"]
    lora = floor(shape, tokens=64, scored=32, lengths=[32, 32], trains="lora", device=CPU)
    full = floor(shape, tokens=64, scored=32, lengths=[32, 32], trains="full", device=CPU)
    assert full["matmul_flops"] == 1.5 * lora["matmul_flops"]
    forward = 2.0 * 64 * shape.layer_parameters + 2.0 * 32 * shape.head_parameters
    assert lora["matmul_flops"] == 2 * forward
    assert 0 < lora["matmul_seconds"] < lora["seconds"]
