"""The reward model against plain transformers: rewards and gradients of each answer alone, however it is packed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_config
from tuner.data.pack import pack
from tuner.errors import ModelError, RecipeError
from tuner.model.adapter import AdapterMeta, attach, check_trained_tokens, load_adapter, save_adapter
from tuner.model.fuse import fuse
from tuner.model.load import load_base, padding_id, set_padding
from tuner.model.quantize import is_4bit
from tuner.model.reward import RewardModel
from tuner.recipe import AdapterSection, ModelSection
from tuner.types import Tokens, span

META = AdapterMeta("base", None, "", None, "llama3", (4,))
END = 4  # <|eot_id|>


def classifier(**changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config(320, **({"num_labels": 1} | changes)))


def lists(answers: int, seed: int = 0, documents: int = 3) -> list[Tokens]:
    """Prompts with so many answers of random ids, each with its terminator; what is trained of an answer differs."""
    g = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        count = int(torch.randint(1, longest, (1,), generator=g))
        return torch.randint(24, 300, (count,), generator=g).tolist()

    def answer(i: int) -> tuple[Any, ...]:
        return (span(ids(9), i % 2 == 0), span([*ids(6), END], True)) if i % 3 else (span([*ids(20), END], True),)

    return [
        Tokens((span([0, *ids(12)], False),), tuple(answer(i) for i in range(answers)), "lists.jsonl", row)
        for row in range(documents)
    ]


def plain_rewards(lm: nn.Module, samples: list[Tokens]) -> Tensor:
    """Each answer after its prompt as a row of its own, by transformers alone; `[S]` in row order."""
    rewards = []
    for sample in samples:
        for branch in sample.branches:
            ids = torch.cat([torch.as_tensor(s.ids).long() for s in (*sample.trunk, *branch)])
            rewards.append(lm(input_ids=ids[None], use_cache=False).logits[0, 0])
    return torch.stack(rewards)


def grads(module: nn.Module) -> dict[str, Tensor]:
    found = {n.removeprefix("lm."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys()
    for name, other in theirs.items():
        assert float((mine[name] - other).norm()) <= tolerance * float(other.norm()), name


def lora(base: PreTrainedModel, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | changes
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **settings))  # type: ignore[return-value]


# --- rewards ---


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
@pytest.mark.parametrize("answers", [2, 4])
def test_rewards_and_gradients_are_those_of_plain_transformers(kind: str, answers: int) -> None:
    lm: nn.Module = classifier(tie_word_embeddings=kind == "tied")
    if kind == "lora":
        lm = lora(lm)  # type: ignore[arg-type]
    plain = copy.deepcopy(lm)
    fuse(lm)
    model, samples = RewardModel(lm, compute_dtype=torch.float32), lists(answers)  # type: ignore[arg-type]
    mine, theirs = model(pack(samples)), plain_rewards(plain, samples)
    assert mine.shape == (3 * answers,) and mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    slopes = torch.randn(len(mine), generator=torch.Generator().manual_seed(2))
    (mine * slopes).sum().backward()
    (theirs * slopes).sum().backward()
    found = grads(model)
    assert_close(found, grads(plain))
    assert any("score" in name for name in found)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_every_attention_implementation_gives_the_same(name: str) -> None:
    batch = pack(lists(3))
    ours = RewardModel(classifier(), compute_dtype=torch.float32)
    other = RewardModel(classifier(), compute_dtype=torch.float32, attn_implementation=name)
    a, b = ours(batch), other(batch)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    assert_close(grads(ours), grads(other))


def padded_with(pad: int | None) -> LlamaForSequenceClassification:
    lm = classifier()
    lm.config.pad_token_id = pad
    return lm


def rewards_of(samples: list[Tokens], row: int, multiple: int = 1, pad: int | None = 7) -> Tensor:
    """The rewards of the answers of document `row` among its batch mates."""
    batch = pack(samples, multiple)
    with torch.no_grad():
        return RewardModel(padded_with(pad), compute_dtype=torch.float32)(batch)[batch.seq_doc == row]


def test_a_reward_depends_on_its_row_alone() -> None:
    """Neither on the filler behind it, batch mates, their order, nor the pad id; on the terminator it does."""
    sample, mates = lists(2)[0], lists(3, seed=5, documents=4)
    alone = rewards_of([sample], 0)
    for found in (
        rewards_of([sample], 0, multiple=64),
        rewards_of([sample, *mates], 0),
        rewards_of([*mates, sample], 4, multiple=64),
        rewards_of([sample], 0, pad=END),
        rewards_of([sample], 0, pad=None),
        rewards_of([replace(sample, branches=sample.branches[::-1])], 0).flip(0),
    ):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
    *_, last = sample.branches[0]
    without = replace(sample, branches=((span(last.ids[:-1], True),), *sample.branches[1:]))
    assert abs(float(rewards_of([without], 0)[0] - alone[0])) > 1e-3


def test_mutant_a_reward_read_one_token_too_early() -> None:
    """What transformers does where the terminator is the padding; the comparison with each answer alone sees it."""
    model, samples = RewardModel(classifier(), compute_dtype=torch.float32), lists(2)
    batch = pack(samples)
    with torch.no_grad():
        early = model(replace(batch, seq_end=batch.seq_end - 1))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(early, plain_rewards(classifier(), samples), rtol=1e-6, atol=1e-6)
        as_padding = plain_rewards(padded_with(END), samples)
        torch.testing.assert_close(early, as_padding, rtol=1e-6, atol=1e-6)


def test_the_head_is_the_one_that_trains() -> None:
    lm = lora(classifier())
    model, batch = RewardModel(lm, compute_dtype=torch.float32), pack(lists(2))
    with torch.no_grad():
        before = model(batch)
        model.head_weight().mul_(2.0)
        assert model.head_weight().requires_grad
        torch.testing.assert_close(model(batch), 2 * before, rtol=1e-6, atol=1e-6)
        with lm.disable_adapter():
            assert not model.head_weight().requires_grad
            torch.testing.assert_close(model(batch), plain_rewards(classifier(), lists(2)), rtol=1e-6, atol=1e-6)


# --- the head in fp32 ---


def distinct(
    lm: PreTrainedModel | PeftModel, compute_dtype: torch.dtype, head: torch.dtype = torch.float32, pairs: int = 50
) -> int:
    """How many different rewards the answers of `pairs` get after one step of the head and the adapter."""
    fuse(lm)
    model, batch = RewardModel(lm, compute_dtype=compute_dtype), pack(lists(2, documents=pairs))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    chosen, rejected = model(batch).view(pairs, 2).T
    (-torch.nn.functional.logsigmoid(chosen - rejected)).mean().backward()
    optimizer.step()
    model.inner.get_submodule("score").to(head)
    with torch.no_grad():
        return len((model(batch) if head == torch.float32 else model(batch).to(head)).unique())


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "nf4"])
def test_rewards_stay_distinct_on_a_narrow_base(tiny_model_dir: Path, four_bit: bool) -> None:
    section = ModelSection(name_or_path=str(tiny_model_dir), dtype="bfloat16", load_in_4bit=four_bit)

    def adapted() -> PeftModel:
        torch.manual_seed(0)
        return attach(load_base(section, "cpu", trainable=False, reward=True), AdapterSection(r=4))

    lm = adapted()
    score = lm.get_base_model().get_submodule("score.modules_to_save.default")
    assert type(score) is nn.Linear and score.weight.dtype == torch.float32 and score.weight.requires_grad
    assert four_bit == any(is_4bit(module) for module in lm.modules())
    assert distinct(lm, torch.bfloat16) > 95
    assert distinct(adapted(), torch.bfloat16, pairs=400) > 0.95 * 800
    assert distinct(adapted(), torch.bfloat16, head=torch.bfloat16, pairs=400) < 0.75 * 800, "as a head in bf16 has it"


# --- loading ---


def base(directory: Path, **changes: Any) -> PreTrainedModel:
    section = ModelSection(name_or_path=str(directory), **({"dtype": "float32"} | changes))
    return load_base(section, "cpu", trainable=True, reward=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_checkpoint_gets_a_head_of_zeros(
    make_model: Callable[..., LlamaForCausalLM], tmp_path: Path, tied: bool
) -> None:
    lm = make_model(tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path)
    model = RewardModel(base(tmp_path), compute_dtype=torch.float32)
    assert isinstance(model.inner, LlamaForSequenceClassification) and model.inner.config.num_labels == 1
    assert not model(pack(lists(2))).any()
    for name, parameter in model.inner.model.named_parameters():
        assert torch.equal(parameter, lm.model.get_parameter(name))


def test_a_classifier_of_one_label_is_gone_on_with(tmp_path: Path) -> None:
    """Its head keeps the precision of its file, whatever the rest is computed in."""
    lm = classifier()
    lm.save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="bfloat16")
    narrow = load_base(section, "cpu", trainable=False, reward=True)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow.get_parameter("score.weight"), lm.score.weight)
    model = RewardModel(base(tmp_path), compute_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(pack(lists(2))), plain_rewards(lm, lists(2)), rtol=1e-6, atol=1e-6)


def test_a_head_of_another_kind_is_refused(tmp_path: Path, make_model: Callable[..., LlamaForCausalLM]) -> None:
    classifier(num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="a classifier of 3 labels, and a reward is one number"):
        base(tmp_path / "three")
    classifier().save_pretrained(tmp_path / "one")
    with pytest.raises(ModelError, match="writes no text; give a causal checkpoint"):
        load_base(ModelSection(name_or_path=str(tmp_path / "one")), "cpu", trainable=False)
    make_model().save_pretrained(tmp_path / "causal")
    file = tmp_path / "causal" / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.zeros(2, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mismatched keys in the weights: score.weight has \[2, 64\]"):
        base(tmp_path / "causal")
    save_file({n: t for n, t in load_file(file).items() if "layers.1." not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing keys in the weights: model.layers.1"):
        base(tmp_path / "causal")


# --- adapters ---


def moved(lm: PeftModel) -> PeftModel:
    """The adapter after some training that this test does not wait for."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.05)
    return lm


def test_a_saved_adapter_is_plain_peft_with_its_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    lm = moved(attach(base(tiny_model_dir).requires_grad_(False), AdapterSection(r=4)))  # type: ignore[arg-type]
    save_adapter(lm, tmp_path / "one", META)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]
    plain = LlamaForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "one"))
    with torch.no_grad():
        wanted = RewardModel(lm, compute_dtype=torch.float32)(pack(lists(2)))
        torch.testing.assert_close(plain_rewards(again, lists(2)), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1
    more = attach(base(tiny_model_dir).requires_grad_(False), AdapterSection(path=str(tmp_path / "one")))
    with torch.no_grad():
        torch.testing.assert_close(RewardModel(more, compute_dtype=torch.float32)(pack(lists(2))), wanted)
    assert any("score" in name for name, p in more.named_parameters() if p.requires_grad)
    save_adapter(more, tmp_path / "two", META)
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
    ]


@pytest.mark.parametrize("saved", [(), ("embed_tokens", "lm_head")], ids=["linears", "saved modules"])
def test_an_adapter_of_a_causal_model_is_gone_on_with(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path, saved: tuple[str, ...]
) -> None:
    """The states are those of the causal model with its adapter, and the head starts at zero."""
    section = AdapterSection(r=4, modules_to_save=saved)
    causal = moved(attach(make_model().requires_grad_(False), section))
    save_adapter(causal, tmp_path / "sft", META)
    lm = attach(base(tiny_model_dir).requires_grad_(False), AdapterSection(path=str(tmp_path / "sft")))
    model, batch = RewardModel(lm, compute_dtype=torch.float32), pack(lists(2))
    with torch.no_grad():
        assert not model(batch).any()
        ids = batch.input_ids[batch.doc_ids == 0][: len(lists(2)[0].trunk[0].ids)]
        wanted = causal.get_base_model().model(input_ids=ids[None]).last_hidden_state[0]
        torch.testing.assert_close(model.hidden_states(batch, torch.arange(len(ids))), wanted, rtol=1e-5, atol=1e-5)
    save_adapter(lm, tmp_path / "reward", META)
    names = set(load_file(tmp_path / "reward" / "adapter_model.safetensors"))
    assert "base_model.model.score.weight" in names and not any("lm_head" in name for name in names)
    assert ("base_model.model.model.embed_tokens.weight" in names) == bool(saved)
    load_adapter(base(tiny_model_dir), tmp_path / "reward")


def test_adapters_of_the_wrong_kind_are_refused(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path
) -> None:
    save_adapter(attach(make_model().requires_grad_(False), AdapterSection(r=4)), tmp_path / "sft", META)
    save_adapter(attach(base(tiny_model_dir), AdapterSection(r=4)), tmp_path / "reward", META)
    with pytest.raises(ModelError, match="is the adapter of a reward model, which writes no text"):
        load_adapter(make_model(), tmp_path / "reward")
    with pytest.raises(ModelError, match="is no adapter of a reward model: it has no score head"):
        load_adapter(base(tiny_model_dir), tmp_path / "sft")
    file = tmp_path / "reward" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "score" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit this base: 'base_model.model.score.weight'"):
        load_adapter(base(tiny_model_dir), tmp_path / "reward")
    with pytest.raises(RecipeError, match="LoRA on score is not supported; it is trained in full"):
        attach(base(tiny_model_dir), AdapterSection(target_modules=("score",)))


def test_untrained_control_tokens_need_the_embeddings_alone() -> None:
    lm = classifier()
    with torch.no_grad():
        lm.model.embed_tokens.weight[3] = 0.0
    with pytest.raises(ModelError, match=r"modules_to_save: \[embed_tokens\]"):
        check_trained_tokens(lm, {3: "<|end_header_id|>", 4: "<|eot_id|>"}, trained=False)


# --- padding ---


def test_padding_is_never_a_terminator(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    assert padding_id(tokenizer, avoid=[END]) == 7
    tokenizer.pad_token_id = END  # as many checkpoints have it
    lm = classifier()
    set_padding(lm, tokenizer, [END, 1])
    assert lm.config.pad_token_id == tokenizer.pad_token_id == 7
    tokenizer.pad_token_id = END
    assert padding_id(tokenizer) == END
    every_pad = [i for i, token in tokenizer.added_tokens_decoder.items() if "pad" in token.content]
    assert padding_id(tokenizer, avoid=[END, 1, *every_pad, 8]) == 0, "BOS, where nothing else is left"
