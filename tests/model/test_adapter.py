"""Adapters: what is refused, what trains and in which dtype, and files that plain peft loads on the untouched base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tuner.errors import ModelError, RecipeError
from tuner.model.adapter import (
    AdapterMeta,
    attach,
    check_trained_tokens,
    load_adapter,
    matched_modules,
    read_meta,
    resolve_targets,
    save_adapter,
)
from tuner.recipe import AdapterSection

IDS = torch.randint(24, 300, (2, 19), generator=torch.Generator().manual_seed(0))
META = AdapterMeta(
    "base", None, "aa", {"type": "nf4", "double_quant": True, "compute_dtype": "float32"}, "llama3", (4,)
)
Make = Callable[..., LlamaForCausalLM]


@torch.no_grad()
def logits(lm: nn.Module) -> Tensor:
    return lm.eval()(input_ids=IDS).logits.float()


def frozen(base: LlamaForCausalLM) -> LlamaForCausalLM:
    return base.requires_grad_(False)


@torch.no_grad()
def train(lm: PeftModel) -> PeftModel:
    """Moves every trainable weight, as steps would."""
    g = torch.Generator().manual_seed(3)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return lm


# --- what is refused ---


def test_a_typo_in_a_target_is_refused_with_the_nearest_name(make_model: Make) -> None:
    with pytest.raises(RecipeError, match=r"adapter.target_modules: 'v_prj' matches no linear.*did you mean 'v_proj'"):
        attach(make_model(), AdapterSection(target_modules=("q_proj", "v_prj")))
    with pytest.raises(RecipeError, match="matches no linear"):
        resolve_targets(make_model(), ["layers.7.self_attn.q_proj"])
    with pytest.raises(RecipeError, match="matches no linear"):
        resolve_targets(make_model(), ["embed_tokens"])


def test_lora_on_the_head_is_refused(make_model: Make) -> None:
    with pytest.raises(RecipeError, match="LoRA on lm_head is not supported; put it in modules_to_save"):
        attach(make_model(), AdapterSection(target_modules=("lm_head",)))


def test_targets_by_name_and_path(make_model: Make) -> None:
    base = make_model()
    everything = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert resolve_targets(base, "all-linear") == everything
    lm = attach(base, AdapterSection(target_modules=("layers.0.self_attn.q_proj", "v_proj")))
    assert matched_modules(lm) == {"q_proj": 1, "v_proj": 2}


def test_modules_to_save_must_exist_and_not_come_apart(make_model: Make) -> None:
    with pytest.raises(RecipeError, match=r"modules_to_save: 'embed_token' matches no module.*'embed_tokens'"):
        attach(make_model(), AdapterSection(modules_to_save=("embed_token",)))
    with pytest.raises(RecipeError, match="'lm_head' is tied"):
        attach(make_model(tie_word_embeddings=True), AdapterSection(modules_to_save=("lm_head",)))


# --- what trains ---


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_masters_are_fp32_over_a_bf16_base(make_model: Make, changes: dict[str, Any]) -> None:
    lm = attach(frozen(make_model().bfloat16()), AdapterSection(r=4, modules_to_save=("lm_head",), **changes))
    trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in lm.named_parameters() if n not in trained} == {torch.bfloat16}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert any("lm_head" in n for n in trained)


def test_small_updates_of_the_masters_are_not_lost(make_model: Make) -> None:
    lm = attach(frozen(make_model().bfloat16()), AdapterSection(r=4))
    weights = [p for n, p in lm.named_parameters() if "lora_A" in n]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p.mul_(1 + 1e-4)
    moved = sum(int((p != b).sum()) for p, b in zip(weights, before, strict=True))
    assert moved > 0.99 * sum(p.numel() for p in weights)


def test_a_fresh_adapter_changes_nothing(make_model: Make) -> None:
    base = make_model()
    for changes in ({}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        lm = attach(frozen(make_model()), AdapterSection(r=4, **changes))  # type: ignore[arg-type]
        torch.testing.assert_close(logits(lm), logits(base), rtol=0, atol=2e-5)


# --- what is saved ---

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "saved modules": {"modules_to_save": ("embed_tokens", "lm_head")},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_saved_adapter_is_plain_peft_on_the_untouched_base(
    make_model: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    lm = train(attach(frozen(make_model()), AdapterSection(r=4, lora_alpha=8, lora_dropout=0.1, **changes)))
    save_adapter(lm, tmp_path / "adapter", META)
    wanted = logits(lm)
    assert (wanted - logits(make_model())).abs().max() > 0.1
    for again in (
        PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter")),
        load_adapter(make_model(), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(again), wanted, rtol=0, atol=2e-5)
        assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    pissa = str(changes.get("init_lora_weights", "")).startswith("pissa")
    assert config["r"] == (8 if pissa else 4)
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == "base"
    assert config["lora_dropout"] == 0.1
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "tuner.json"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_mutant_a_pissa_adapter_saved_as_it_trained(make_model: Make, tmp_path: Path) -> None:
    """peft's own files of the same adapter, put on the untouched base, are another model."""
    lm = train(attach(frozen(make_model()), AdapterSection(r=4, init_lora_weights="pissa")))
    lm.save_pretrained(str(tmp_path / "adapter"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    again = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    assert (logits(again) - logits(lm)).abs().max() > 0.1


def test_what_an_adapter_says_about_itself(make_model: Make, tmp_path: Path) -> None:
    assert read_meta(tmp_path) is None
    save_adapter(attach(make_model(), AdapterSection()), tmp_path, META)
    assert read_meta(tmp_path) == META
    (tmp_path / "tuner.json").write_text('{"base": 1}')
    with pytest.raises(ModelError, match="tuner.json cannot be read"):
        read_meta(tmp_path)


# --- what is loaded ---


@pytest.fixture
def saved(make_model: Make, tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    save_adapter(train(attach(frozen(make_model()), AdapterSection(r=4, target_modules=("q_proj",)))), directory, META)
    return directory


def test_a_continued_adapter_starts_where_it_ended(make_model: Make, saved: Path, tmp_path: Path) -> None:
    lm = attach(frozen(make_model().bfloat16()), AdapterSection(path=str(saved)))
    trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
    assert trained and all("q_proj" in n and p.dtype == torch.float32 for n, p in trained.items())
    lm = train(attach(frozen(make_model()), AdapterSection(path=str(saved))))
    save_adapter(lm, tmp_path / "more", META)
    again = PeftModel.from_pretrained(make_model(), str(tmp_path / "more"))
    torch.testing.assert_close(logits(again), logits(lm), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # peft warns, then we refuse
def test_an_adapter_that_does_not_fit_is_refused(make_model: Make, saved: Path) -> None:
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(make_model(hidden_size=32), saved)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(make_model(num_hidden_layers=1), saved)
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    for names in (sorted(tensors)[1:], [*tensors, "base_model.model.extra.lora_A.weight"]):
        save_file({n: tensors.get(n, torch.zeros(1)) for n in names}, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="does not fit this base: '.*' is in only one of the two"):
            load_adapter(make_model(), saved)


def test_a_damaged_or_foreign_adapter_is_refused_by_name(make_model: Make, saved: Path, tmp_path: Path) -> None:
    file = saved / "adapter_model.safetensors"
    for size in (3, 60, file.stat().st_size - 10):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelError, match=f"{file} cannot be read"):
            load_adapter(make_model(), saved)
    file.unlink()
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors only"):
        load_adapter(make_model(), saved)
    with pytest.raises(ModelError, match="holds no adapter_config.json"):
        load_adapter(make_model(), tmp_path)
    (saved / "adapter_model.bin").rename(file)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError):
        load_adapter(make_model(), saved)


# --- control tokens that pretraining never saw ---

CONTROL = {2: "<|start_header_id|>", 3: "<|end_header_id|>", 4: "<|eot_id|>"}


@pytest.mark.parametrize("how", ["zeros", "equal"])
def test_untrained_control_tokens_are_refused(make_model: Make, how: str) -> None:
    base = make_model()
    check_trained_tokens(base, CONTROL, trained=False)
    with torch.no_grad():
        embeddings = base.get_input_embeddings().weight
        embeddings[3] = 0.0 if how == "zeros" else embeddings[4]
    with pytest.raises(ModelError, match=r"<\|end_header_id\|>.*modules_to_save: \[embed_tokens, lm_head\]"):
        check_trained_tokens(base, CONTROL, trained=False)
    check_trained_tokens(base, CONTROL, trained=True)
    check_trained_tokens(base, {}, trained=False)
    check_trained_tokens(base, {2: "<|start_header_id|>"}, trained=False)
