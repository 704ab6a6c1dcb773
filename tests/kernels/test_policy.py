"""A whole policy that computes with Triton against the same one on the references: log-probs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from tuner import kernels
from tuner.data.pack import pack
from tuner.model.fuse import fuse
from tuner.model.policy import Policy
from tuner.types import Tokens, span

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scored(lm: torch.nn.Module, backend: str, samples: list[Tokens]) -> dict[str, Tensor]:
    """The log-probs, their entropies, and every gradient of a weighted sum."""
    lm = copy.deepcopy(lm).to(DEVICE)
    functions = kernels.load(backend, "tuner_varlen")
    fuse(lm, functions)
    policy = Policy(lm, compute_dtype=torch.float32, kernels=functions).train()
    batch = pack(samples).to(DEVICE)
    logps, entropies = policy(batch, measures=("entropy",))
    (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)).sum().backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {"logps": logps.detach(), "entropies": entropies.detach(), **found}


@pytest.mark.parametrize("kind", ["lora", "norms and head"])
def test_a_policy_is_the_same_on_every_backend(kind: str, make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Two documents in one row, one of them with two branches on a trunk."""
    lm: torch.nn.Module = make_model()
    if kind == "lora":
        config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        lm = get_peft_model(lm, config)
    else:
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("norm" in name or "lm_head" in name)
    samples = [
        Tokens((span([0, 31, 45], False),), ((span([50, 51, 1], True),), (span([60, 1], True),))),
        Tokens((span([0, 90], False), span([77, 78, 1], True)), ()),
    ]
    found, wanted = (scored(lm, backend, samples) for backend in ("triton", "reference"))
    assert found.keys() == wanted.keys() and len(found) > 3
    for name, right in wanted.items():
        assert float((found[name] - right).norm()) <= 1e-5 * float(right.norm()), name
