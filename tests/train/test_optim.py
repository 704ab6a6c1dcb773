"""The schedule in closed form, the groups that decay, and clipping as torch does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tuner.errors import RecipeError
from tuner.model.adapter import attach
from tuner.recipe import AdapterSection, TrainSection
from tuner.train.optim import build_optimizer, clip, parameter_groups, schedule

N = 20


def section(**changes: Any) -> TrainSection:
    return TrainSection(**({"output_dir": "x", "learning_rate": 2.0, "warmup_steps": 4} | changes))


def rates(**changes: Any) -> list[float]:
    at = schedule(section(**changes), N)
    return [at(step) for step in range(N)]


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_closed_forms(floor: float) -> None:
    """Warm-up over 4 of 20 steps, then x = (t - 4) / 16 of the way down to the floor."""
    warm = [0.5, 1.0, 1.5, 2.0]
    x = [i / 16 for i in range(16)]
    assert rates(lr_scheduler_type="constant") == pytest.approx(warm + [2.0] * 16)
    linear = [2 * (floor + (1 - floor) * (1 - v)) for v in x]
    assert rates(lr_scheduler_type="linear", min_lr_ratio=floor) == pytest.approx(warm + linear)
    cosine = [2 * (floor + (1 - floor) * (1 + math.cos(math.pi * v)) / 2) for v in x]
    assert rates(lr_scheduler_type="cosine", min_lr_ratio=floor) == pytest.approx(warm + cosine)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 100])
def test_every_step_learns_and_the_peak_is_reached(kind: str, warmup: int) -> None:
    values = rates(lr_scheduler_type=kind, warmup_steps=warmup)
    assert min(values) > 0 and values[0] > 0
    assert max(values) == (2.0 if warmup <= N else pytest.approx(2.0 * N / warmup))
    rising = values[: max(1, warmup)]
    assert rising == sorted(rising)
    falling = values[max(1, warmup) :]
    assert falling == sorted(falling, reverse=True)


def test_a_warm_up_ratio_is_rounded_up() -> None:
    assert rates(warmup_steps=None, warmup_ratio=0.11, lr_scheduler_type="constant")[:4] == pytest.approx(
        [2 / 3, 4 / 3, 2, 2]
    )
    assert rates(warmup_steps=None, warmup_ratio=0.0, lr_scheduler_type="constant")[0] == 2.0
    assert schedule(section(warmup_steps=None), 1)(0) == 2.0  # a run of one step


def test_only_matrices_decay(make_model: Callable[..., LlamaForCausalLM]) -> None:
    lm = make_model(attention_bias=True)
    groups, names = parameter_groups(lm, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all("proj.weight" in n or n == "lm_head.weight" for n in names["decay"])
    assert "model.embed_tokens.weight" in names["no_decay"]
    assert {n for n in names["no_decay"] if "norm" not in n and "bias" not in n} == {"model.embed_tokens.weight"}
    assert len(names["decay"]) + len(names["no_decay"]) == len(list(lm.parameters()))
    assert len(parameter_groups(lm, 0.0)[0]) == 1
    _, tied = parameter_groups(make_model(tie_word_embeddings=True), 0.1)
    assert not any("embed" in n or "lm_head" in n for n in tied["decay"])


def test_adapters_matrices_decay_and_the_frozen_base_is_in_no_group(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    lm = attach(make_model().requires_grad_(False), AdapterSection(r=4, use_dora=True))
    _, names = parameter_groups(lm, 0.1)
    assert all("lora_A" in n or "lora_B" in n for n in names["decay"]) and len(names["decay"]) == 28
    assert all("magnitude" in n for n in names["no_decay"]) and len(names["no_decay"]) == 14


def test_what_has_no_gradient_does_not_shrink(make_model: Callable[..., LlamaForCausalLM]) -> None:
    lm = make_model()
    optimizer = build_optimizer(lm, section(weight_decay=0.1), torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in lm.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(parameter_groups(lm, 0.1)[1]["decay"])


def test_the_optimizer_is_adamw_of_the_paper() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer(nn.ParameterList([parameter]), section(weight_decay=0.1), torch.device("cpu"))
    m = v = torch.zeros(1, 2)
    wanted = parameter.detach().clone()
    for t in (1, 2, 3):
        grad = torch.tensor([[0.3, -0.1]]) * t
        parameter.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        wanted = wanted * (1 - 2.0 * 0.1) - 2.0 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach(), wanted)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_gpu_optimizers_are_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(RecipeError, match=f"train.optim: '{name}' needs a GPU; on this CPU use 'adamw_torch'"):
        build_optimizer(nn.Linear(2, 2), section(optim=name), torch.device("cpu"))


@pytest.mark.parametrize("limit", [0.5, 1e6, 0.0])
def test_clipping_is_torchs(limit: float) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2))
        module[:2](torch.randn(4, 5)).square().sum().backward()  # the last one has no gradient
        return module

    mine, theirs = layers(), layers()
    norm = clip(mine.parameters(), limit)
    wanted = nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6) and norm > 1
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
