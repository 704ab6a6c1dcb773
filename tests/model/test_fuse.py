"""A fused module is the module it replaces: the same values, gradients and names, over every way to adapt a linear."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tuner import kernels
from tuner.data.pack import pack
from tuner.kernels.lora_linear import node
from tuner.kernels.rope import reference as rope
from tuner.model import quantize
from tuner.model.fuse import FUSED, LAST, fuse
from tuner.model.load import load_base
from tuner.model.policy import Policy
from tuner.recipe import ModelSection
from tuner.types import Tokens, span

IDS = torch.randint(24, 300, (2, 19), generator=torch.Generator().manual_seed(0))
Make = Callable[..., LlamaForCausalLM]


def adapted(base: nn.Module, **changes: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def results(lm: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Logits, and the gradient of every trainable parameter."""
    lm.zero_grad()
    torch.manual_seed(seed)  # of the dropout
    logits = lm(input_ids=IDS, use_cache=False).logits
    logits.float().log_softmax(-1).gather(2, IDS[:, :, None].flip(1)).sum().backward()
    grads = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in lm.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **grads}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, other in theirs.items():
        assert mine[name].dtype == other.dtype, name
        scale = max(float(other.norm()), 1e-6)
        assert float((mine[name] - other).norm()) <= 1e-5 * scale, name


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.2},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_fused_adapter_is_the_stock_one(make_model: Make, settings: dict[str, Any], training: bool) -> None:
    biased = "lora_bias" in settings
    lm = adapted(make_model(attention_bias=biased, mlp_bias=biased), **settings).train(training)
    fused = copy.deepcopy(lm)
    fuse(fused)
    assert_same(results(fused), results(lm))


def test_full_weights(make_model: Make) -> None:
    lm = make_model(attention_bias=True, mlp_bias=True)
    fused = copy.deepcopy(lm)
    fuse(fused)
    assert_same(results(fused), results(lm))


def test_biases_of_the_base(make_model: Make) -> None:
    lm = adapted(make_model(attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    fused = copy.deepcopy(lm)
    fuse(fused)
    assert_same(results(fused), results(lm))


def test_disabled_merged_and_second_adapters_take_the_original_path(make_model: Make) -> None:
    lm = adapted(make_model())
    fused = copy.deepcopy(lm)
    fuse(fused)
    with torch.no_grad():
        on = fused(input_ids=IDS).logits
        with lm.disable_adapter(), fused.disable_adapter():
            off = fused(input_ids=IDS).logits
            torch.testing.assert_close(off, lm(input_ids=IDS).logits, rtol=0, atol=1e-5)
        assert (on - off).abs().max() > 0.1
        fused.merge_adapter()
        torch.testing.assert_close(fused(input_ids=IDS).logits, on, rtol=0, atol=1e-4)
        fused.unmerge_adapter()
        for model in (lm, fused):
            torch.manual_seed(3)
            model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "second"])
        both = fused(input_ids=IDS).logits
        torch.testing.assert_close(both, lm(input_ids=IDS).logits, rtol=0, atol=1e-4)
        assert (both - on).abs().max() > 0.01


def test_names_types_and_counts_stay(make_model: Make) -> None:
    lm = adapted(make_model())
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    classes = {name: type(module) for name, module in lm.named_modules()}
    assert fuse(lm) == {
        "FusedLlamaDecoderLayer": 1,
        "LastLlamaDecoderLayer": 1,
        "FusedLoraLinear": 14,
        "FusedLlamaAttention": 2,
        "FusedLlamaRMSNorm": 5,
        "FusedLlamaMLP": 2,
    }
    after = lm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    for name, module in lm.named_modules():
        assert isinstance(module, classes[name])
    assert fuse(lm) == {}, "a second call has nothing left to swap"


def test_every_row_of_the_table_is_a_subclass() -> None:
    for stock, fused in [*FUSED.items(), *LAST.items()]:
        assert issubclass(fused, stock)


def test_another_activation_keeps_its_mlp(make_model: Make) -> None:
    assert fuse(make_model(hidden_act="gelu")) == {
        "FusedLlamaDecoderLayer": 1,
        "LastLlamaDecoderLayer": 1,
        "FusedLlamaAttention": 2,
        "FusedLlamaRMSNorm": 5,
    }


def test_mistral() -> None:
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    lm = MistralForCausalLM(config)
    fused = copy.deepcopy(lm)
    assert fuse(fused) == {
        "FusedMistralDecoderLayer": 1,
        "LastMistralDecoderLayer": 1,
        "FusedMistralAttention": 2,
        "FusedMistralRMSNorm": 5,
        "FusedMistralMLP": 2,
    }
    assert_same(results(fused), results(lm))


def test_gradients_reach_adapters_through_activation_checkpointing(make_model: Make) -> None:
    lm = adapted(make_model(), lora_dropout=0.2)
    fuse(lm)
    plain = results(lm)
    lm.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(results(lm), plain)


def test_masters_in_fp32_over_a_bf16_base(make_model: Make) -> None:
    """The adapter's gradients come back in fp32, about as exact as peft's own with everything in bf16."""
    exact = results(adapted(make_model()))
    lm = adapted(make_model().bfloat16())
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    stock = adapted(make_model().bfloat16())
    for parameter, master in zip(stock.parameters(), lm.parameters(), strict=True):
        parameter.data = master.data.bfloat16()
    fuse(lm)
    mine, theirs = results(lm), results(stock)
    for name, wanted in exact.items():
        error, allowed = (mine[name].float() - wanted).norm(), (theirs[name].float() - wanted).norm()
        assert name == "logits" or mine[name].dtype == torch.float32
        assert error <= 1.5 * allowed, name


@pytest.mark.parametrize(("settings", "recompute"), [({}, False), ({"lora_dropout": 0.2}, "selective")])
def test_the_triton_backend_is_the_stock_model(make_model: Make, settings: dict[str, Any], recompute: Any) -> None:
    lm = adapted(make_model(attention_bias=True), **settings)
    fused = copy.deepcopy(lm)
    fuse(fused, kernels.load("triton"), recompute=recompute)
    assert_same(results(fused), results(lm))


# --- 4-bit ---


@pytest.fixture
def base_4bit(tiny_model_dir: Path) -> nn.Module:
    section = ModelSection(name_or_path=str(tiny_model_dir), dtype="float32", load_in_4bit=True)
    return load_base(section, "cpu", trainable=False)


def dequantized(base: nn.Module, make_model: Make) -> LlamaForCausalLM:
    """The matrices that the 4-bit base stands for, in a plain model."""
    plain = make_model()
    with torch.no_grad():
        for name, module in base.named_modules():
            if quantize.is_4bit(module):
                plain.get_submodule(name).weight.copy_(quantize.dequantize(module, torch.float32))
            elif isinstance(module, (nn.Embedding, nn.Linear)):
                plain.get_submodule(name).weight.copy_(module.weight)
    return plain.requires_grad_(False)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_4bit_base_is_its_dequantised_matrix(
    base_4bit: nn.Module, make_model: Make, settings: dict[str, Any], training: bool
) -> None:
    plain = adapted(dequantized(base_4bit, make_model), **settings).train(training)
    lm = adapted(base_4bit, **settings).train(training)
    fuse(lm)
    packed = {name: p.clone() for name, p in lm.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14
    assert_same(results(lm), results(plain))
    for name, parameter in lm.named_parameters():  # not repacked, whatever the mode
        assert name not in packed or torch.equal(parameter, packed[name])


def test_a_4bit_base_on_the_triton_backend(base_4bit: nn.Module, make_model: Make) -> None:
    plain, lm = adapted(dequantized(base_4bit, make_model)), adapted(base_4bit)
    fuse(lm, kernels.load("triton"))
    assert_same(results(lm), results(plain))


def test_an_unadapted_4bit_linear_passes_gradients_on(base_4bit: nn.Module, make_model: Make) -> None:
    plain = adapted(dequantized(base_4bit, make_model), target_modules=["q_proj"]).eval()
    lm = adapted(base_4bit, target_modules=["q_proj"]).eval()
    assert fuse(lm)["FrozenLinear4bit"] == 14
    assert_same(results(lm), results(plain))


# --- mutants: the comparison above notices them ---


def test_mutant_scaling(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = adapted(make_model(), use_rslora=True)
    fused = copy.deepcopy(lm)
    fuse(fused)
    stock = results(lm)
    original = node.LoraLinears.apply

    def halved(x: Tensor, parts: Any, group: node.Group, *adapters: Tensor) -> Any:
        return original(x, parts, replace(group, scalings=[s / 2 for s in group.scalings]), *adapters)

    monkeypatch.setattr(node.LoraLinears, "apply", halved)
    with pytest.raises(AssertionError):
        assert_same(results(fused), stock)


def test_mutant_a_rotation_that_turns_the_other_way(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, batch = make_model(), pack([Tokens((span(range(24, 44), False), span(range(24, 44), True)))])
    plain = Policy(copy.deepcopy(lm), compute_dtype=torch.float32)(batch)
    fuse(lm)
    policy, rotated = Policy(lm, compute_dtype=torch.float32), rope._rotated
    torch.testing.assert_close(policy(batch), plain, rtol=0, atol=1e-5)
    monkeypatch.setattr(rope, "_rotated", lambda x, cos, sin: rotated(x, cos, -sin / 2))
    assert float((policy(batch) - plain).detach().abs().max()) > 1e-3
