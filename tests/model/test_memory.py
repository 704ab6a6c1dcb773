"""What a decoder layer keeps for its backward, in bytes a token, and that keeping less changes no bit of the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.data.pack import pack
from tuner.model import fuse as fusing
from tuner.model.fuse import Recompute, fuse
from tuner.model.load import load_base
from tuner.model.policy import Policy
from tuner.recipe import ModelSection
from tuner.types import Batch, Tokens, span

H, N = 128, 1088  # more keys than the short segments of a CPU, whose probabilities are kept
RANK = 1
# What an 8B keeps a token a layer, counted in H: its I is 3.5 H, and keys and values are H / 4 wide.
STREAM = 2  # the layer's input, and the sum that its second norm reads
ATTENTION = 1 + 0.25 + 0.25 + 1  # q and k as they are rotated, v, and what comes out
NORMED = 2
GATED = 2 * 3.5
LLAMA_8B = 4096 * 2 * 32  # bytes of H in bf16 in all of its layers


class Storages(TorchDispatchMode):
    """The storages that operators make beside those of a model, of which some live on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            storage = out.untyped_storage() if isinstance(out, Tensor) else None
            if storage is not None and storage._cdata not in self.model:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def layer_bytes(dropout: float = 0.0, recompute: Recompute = False) -> float:
    """Bytes a token that one layer of a LoRA model in bf16 adds to what is kept, counted in H values of bf16."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=H, intermediate_size=7 * H // 2, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    lm: Any = LlamaForCausalLM(config).bfloat16()
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    lm = get_peft_model(lm, lora, autocast_adapter_dtype=True)
    fuse(lm, recompute=recompute)
    policy = Policy(lm, compute_dtype=torch.bfloat16).train()
    layers: Any = policy.inner.model.layers
    storages, seen = Storages(lm), []
    layers[1].register_forward_pre_hook(lambda *_: seen.append(storages.live()))
    layers[1].register_forward_hook(lambda *_: seen.append(storages.live()))
    batch = pack([Tokens((span([1] * 8, False), span([2] * (N - 8), True)))])
    with storages:
        kept = policy(batch)
    before, after = seen
    del kept
    return (after - before) / (batch.num_tokens * H * 2)


def small() -> float:
    """Beside what is H wide: x A of 7 linears, two 1 / rms and the log-sum-exp of 8 heads; the masters in bf16 once."""
    per_token = 7 * RANK * 2 + 2 * 4 + 8 * 4
    masters = RANK * 2 * H * (4 * 2 + 2 * 0.25 - 0.5 + 0.5 + 3 * (1 + 3.5))
    return (per_token + masters / N) / (H * 2) + 0.03  # the rest: states of random numbers, views


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_each_thing_once(dropout: float) -> None:
    found = layer_bytes(dropout)
    ideal = STREAM + ATTENTION + NORMED + GATED
    print(f"{found:.2f} H, {found * LLAMA_8B / 1e6:.2f} MB a token of an 8B")
    assert ideal <= found <= ideal + small()
    assert ideal * LLAMA_8B < 3.6e6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_selectively_it_keeps_what_its_attention_needs(dropout: float) -> None:
    found = layer_bytes(dropout, recompute="selective")
    ideal = STREAM + ATTENTION
    print(f"{found:.2f} H, {found * LLAMA_8B / 1e6:.2f} MB a token of an 8B")
    assert ideal <= found <= ideal + small()


def test_with_full_recompute_it_keeps_its_input() -> None:
    found = layer_bytes(recompute=True)
    print(f"{found:.2f} H, {found * LLAMA_8B / 1e6:.2f} MB a token of an 8B")
    assert 1 <= found <= 1 + 0.1


@pytest.mark.parametrize(
    ("name", "instead"),
    [("_not_kept", lambda *_: nullcontext()), ("checkpoint", lambda f, x, **_: f(x))],
    ids=["norms are kept", "the MLP is kept"],
)
def test_mutant_what_is_kept_shows(name: str, instead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, name, instead)
    assert layer_bytes(recompute="selective") > STREAM + ATTENTION + small() + 0.5


# --- the same bits ---

DOCUMENTS = [Tokens((span(range(24, 24 + n), False), span(range(90, 90 + n), True))) for n in (5, 1, 9)]
Make = Callable[..., LlamaForCausalLM]


def adapted(base: nn.Module, **changes: Any) -> nn.Module:
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def gradients(lm: Any, dtype: torch.dtype, mode: Recompute, between: Callable[[Policy, Batch], object]) -> list[Tensor]:
    """Log-probs and gradients of a fused copy of `lm`; `between` happens after the forward."""
    lm = copy.deepcopy(lm)
    fuse(lm, recompute=mode)
    policy, batch = Policy(lm, compute_dtype=dtype).train(), pack(DOCUMENTS)
    torch.manual_seed(3)  # of the dropout
    logps = policy(batch)
    between(policy, batch)
    logps.square().sum().backward()
    return [logps.detach(), *(p.grad for p in lm.parameters() if p.grad is not None)]


def reference_pass(policy: Policy, batch: Batch) -> None:
    with torch.no_grad(), policy.lm.disable_adapter() if hasattr(policy.lm, "disable_adapter") else nullcontext():
        policy(batch)


KINDS: dict[str, dict[str, Any] | None] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.2},
    "dora": {"use_dora": True},
    "attention only": {"target_modules": ["q_proj", "o_proj"]},
    "trained norm": {"modules_to_save": ["post_attention_layernorm"], "target_modules": ["up_proj"]},
    "full": None,
}


@pytest.mark.parametrize("mode", ["selective", True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_what_is_made_again_is_the_same(
    make_model: Make, settings: dict[str, Any] | None, dtype: torch.dtype, mode: Recompute
) -> None:
    base = make_model().to(torch.float32 if settings is None else dtype)
    lm = base if settings is None else adapted(base, **settings)
    plain = gradients(lm, dtype, False, lambda *_: None)
    for mine, kept in zip(gradients(lm, dtype, mode, reference_pass), plain, strict=True):
        assert torch.equal(mine, kept)


@pytest.mark.parametrize("mode", [False, "selective", True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"target_modules": ["q_proj"]}])
def test_the_buffer_of_4bit_weights_is_written_between_forward_and_backward(
    tiny_model_dir: Path, settings: dict[str, Any], dtype: str, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = ModelSection(name_or_path=str(tiny_model_dir), dtype=dtype, load_in_4bit=True)
    lm = adapted(load_base(section, "cpu", trainable=False), **settings)

    def poison(policy: Policy, batch: Batch) -> None:
        reference_pass(policy, batch)
        assert fusing.quantize._workspaces
        for buffer in fusing.quantize._workspaces.values():
            buffer.fill_(float("nan"))

    found = gradients(lm, getattr(torch, dtype), mode, poison)
    monkeypatch.setattr(fusing.quantize, "borrow", lambda module, dtype, _: fusing.quantize.dequantize(module, dtype))
    for mine, own in zip(found, gradients(lm, getattr(torch, dtype), False, lambda *_: None), strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("mode", ["selective", True])
def test_the_linear_whose_output_nobody_reads_is_not_made_again(
    make_model: Make, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight is read once forward and once backward; in a recompute that of the last linear is not."""
    read: dict[int, int] = {}
    weight = fusing._Frozen.weight

    def counted(base: Any, dtype: torch.dtype) -> Tensor:
        read[id(base.base)] = read.get(id(base.base), 0) + 1
        return weight(base, dtype)

    monkeypatch.setattr(fusing._Frozen, "weight", counted)
    lm = adapted(make_model())
    fuse(lm, recompute=mode)
    batch = pack(DOCUMENTS)
    Policy(lm, compute_dtype=torch.float32).train()(batch).sum().backward()
    counts = {name: read[id(m.base_layer)] for name, m in lm.named_modules() if hasattr(m, "base_layer")}
    again = {"gate_proj", "up_proj"} | (set() if mode == "selective" else {"q_proj", "k_proj", "v_proj", "o_proj"})
    for name, count in counts.items():
        leaf = name.rpartition(".")[2]
        first = "layers.0.self_attn" in name and leaf != "o_proj"  # whose input has no gradient
        assert count == 2 + (leaf in again) - first, name
