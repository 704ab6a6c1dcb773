"""What training takes, in bytes: against what a model really keeps, against numbers by hand, and the rule itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.errors import RecipeError
from tuner.model.adapter import attach
from tuner.model.fuse import fuse
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages.machine import find_machine
from tuner.train import memory
from tuner.train.memory import BATCH_BYTES, MOST_TOKENS, SHARE, Shape, largest, microbatch, scoring, training
from tuner.train.setup import Devices
from tuner.types import Tokens, span

BF16, FP32 = torch.bfloat16, torch.float32
GB = 1e9
CPU = Devices(torch.device("cpu"), 0, 1)
# hidden, inner, layers, heads, vocabulary, tied
SIZES = {
    "56M": (512, 1_408, 8, 8, 32_000, False),
    "1B": (2_048, 8_192, 16, 32, 128_256, True),
    "8B": (4_096, 14_336, 32, 32, 128_256, False),
    "70B": (8_192, 28_672, 80, 64, 128_256, False),
}
FULL = {"adapter": None}
QLORA = {"model.load_in_4bit": True}
CHECKPOINTED = {"train.activation_checkpointing": True}
SELECTIVE = {"train.activation_checkpointing": "selective"}
DEVICES = [8e9, 16e9, 24e9, 40e9, 48e9, 80e9, 96e9, 141e9, 192e9, 1e15]


def config(size: str) -> LlamaConfig:
    hidden, inner, layers, heads, vocabulary, tied = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if heads > 8 else 4,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def recipe(stage: str = "sft", **changes: Any) -> Recipe:
    """A LoRA recipe with changed keys; `adapter: None` takes the adapter out."""
    tree: dict[str, Any] = {
        "stage": stage,
        "model": {"name_or_path": "m"},
        "adapter": {},
        "data": {"train": "d.jsonl"},
        "train": {"output_dir": "o", "learning_rate": 1e-4},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        if leaf:
            tree[section][leaf] = value
        else:
            tree[section] = value
    return Recipe.model_validate({k: v for k, v in tree.items() if v is not None})


def tokens(size: str, total: float, stage: str = "sft", max_length: int = 64, **changes: Any) -> int:
    footprint = training(recipe(stage, **changes), config(size), BF16, "cuda")
    try:
        return largest(footprint, total, "cuda", max_length).tokens
    except RecipeError:
        return 0


# --- the estimate ---


@pytest.mark.parametrize("size", ["1B", "8B"])
def test_the_shape_has_the_weights_of_the_model(size: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config(size))
    shape = Shape.of(model.config)
    assert shape.in_linears + shape.beside(reward=False) == model.num_parameters()
    assert (
        shape.beside(reward=False) - shape.beside(reward=True) == (0 if shape.tied else shape.in_table) - shape.hidden
    )


@pytest.mark.parametrize("changes", [{}, {"target_modules": ("q_proj", "down_proj")}, {"use_dora": True, "r": 4}])
def test_the_adapter_has_its_weights(changes: dict[str, Any], make_model: Callable[..., LlamaForCausalLM]) -> None:
    base = make_model()
    section = recipe(adapter=changes).adapter
    assert section is not None
    trained = sum(p.numel() for p in attach(base, section).parameters() if p.requires_grad)
    assert memory._in_adapter(Shape.of(base.config), section, reward=False) == trained


def kept_bytes(policy: Policy, length: int) -> int:
    """Bytes that autograd keeps of one document of `length` tokens, parameters apart."""
    batch = pack([Tokens((span([0], False), span([5] * (length - 1), True)))])
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is met twice in the same place

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch).sum()
    return sum(kept.values())


WAYS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "lora": ({}, FP32),
    "lora of some": ({"adapter": {"target_modules": ("q_proj", "v_proj")}}, FP32),
    "dropout": ({"adapter": {"lora_dropout": 0.1}}, FP32),
    "dora": ({"adapter": {"use_dora": True}}, FP32),
    "lora in bf16": ({}, BF16),
    "embeddings too": ({"adapter": {"modules_to_save": ("embed_tokens", "lm_head")}}, BF16),
    "full": (FULL, FP32),
    "full in bf16": (FULL, BF16),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_token_costs_what_the_model_keeps(way: str, make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Never less, and not so much more that half of a device would lie idle. Documents longer than the short ones that
    a CPU attends to in its own way."""
    changes, compute = WAYS[way]
    asked = recipe(**changes)
    lm: Any = make_model(max_position_embeddings=4096, num_hidden_layers=3).requires_grad_(asked.adapter is None)
    if asked.adapter is not None:
        lm = attach(lm.to(compute), asked.adapter)
    fuse(lm)
    policy = Policy(lm, compute_dtype=compute).train()
    real = (kept_bytes(policy, 2560) - kept_bytes(policy, 1280)) / 1280
    shape = Shape.of(policy.inner.config)
    footprint = training(asked, policy.inner.config, compute, "cpu")
    estimate = footprint.token - memory._working(shape, compute.itemsize) - BATCH_BYTES
    assert real <= estimate <= 1.5 * real, (real, estimate)


def test_an_8b_by_hand() -> None:
    """Each layer keeps 2 x (2 residuals, 2 normed: 4 x 4,096; q, k, v, output: 10,240; gate and up: 2 x 14,336)
    bytes and a little: 111 KB, so 3.5 MB in 32 of them."""
    footprint = training(recipe(), config("8B"), BF16, "cuda")
    assert footprint.token == pytest.approx(32 * 2 * (4 * 4096 + 10_240 + 2 * 14_336), rel=0.1)
    assert footprint.fixed["weights"] == pytest.approx(16.06 * GB + 42e6 * 4, rel=0.01)
    assert footprint.fixed["optimizer"] == pytest.approx(42e6 * 8, rel=0.01)
    assert training(recipe(**CHECKPOINTED), config("8B"), BF16, "cuda").token == pytest.approx(0.6e6, rel=0.1)
    selective = training(recipe(**SELECTIVE), config("8B"), BF16, "cuda")
    assert selective.token == pytest.approx(32 * 2 * (2 * 4096 + 10_240) + 0.35e6, rel=0.1)
    full = training(recipe(**FULL), config("8B"), BF16, "cuda")
    assert full.total_fixed == pytest.approx(8.03 * GB * (4 + 4 + 8 + 2), rel=0.06)
    half = training(recipe(**FULL, **{"train.param_dtype": "bfloat16"}), config("8B"), BF16, "cuda")
    assert half.fixed["optimizer"] == pytest.approx(8.03 * GB * 4, rel=0.01)


def test_what_costs_more_and_what_less() -> None:
    def fixed(stage: str = "sft", **changes: Any) -> float:
        return training(recipe(stage, **changes), config("8B"), BF16, "cuda").total_fixed

    assert fixed(**QLORA) < 0.6 * fixed()
    assert fixed(**QLORA, **{"model.bnb_4bit_use_double_quant": False}) > fixed(**QLORA)
    assert fixed(**{"adapter.r": 64}) > fixed() > fixed(**{"adapter.target_modules": ("q_proj",)})
    assert fixed(**FULL, **{"train.optim": "adamw_8bit"}) < fixed(**FULL)
    assert fixed("dpo", **FULL) - fixed(**FULL) == pytest.approx(4 * 8.03 * GB, rel=0.01), "a copy of the start"
    assert fixed("dpo") == fixed(), "the policy without its adapter is the reference"
    assert fixed("dpo", **{"adapter.init_lora_weights": "pissa"}) > fixed("dpo")
    assert fixed("reward") < fixed(), "no table of logits"
    other = training(recipe("dpo"), config("8B"), BF16, "cuda", reference=config("1B"))
    assert other.fixed["reference"] == pytest.approx(1.24 * GB * 2, rel=0.01)
    assert scoring(config("8B"), BF16).total_fixed < fixed()


# --- the rule ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{}, QLORA, CHECKPOINTED, FULL], ids=["lora", "qlora", "checkpointed", "full"])
def test_more_memory_never_gives_less(size: str, changes: dict[str, Any]) -> None:
    found = [tokens(size, total, **changes) for total in DEVICES]
    assert found == sorted(found)
    assert found[-1] == MOST_TOKENS["cuda"]


@pytest.mark.parametrize("total", DEVICES)
def test_a_lighter_run_never_gets_less(total: float) -> None:
    for lighter in (QLORA, CHECKPOINTED, SELECTIVE, {"adapter.target_modules": ("q_proj",)}):
        for size in ("1B", "8B", "70B"):
            assert tokens(size, total, **lighter) >= tokens(size, total)
            assert tokens(size, total, **CHECKPOINTED) >= tokens(size, total, **SELECTIVE)
    by_size = [tokens(size, total) for size in SIZES]
    assert by_size == sorted(by_size, reverse=True)
    assert tokens("8B", total) >= tokens("8B", total, **FULL)


@pytest.mark.parametrize(("size", "total"), [("8B", 141e9), ("8B", 80e9), ("1B", 24e9), ("56M", 8e9)])
def test_what_is_chosen_fits_and_more_would_not(size: str, total: float) -> None:
    footprint = training(recipe(), config(size), BF16, "cuda")
    choice = largest(footprint, total, "cuda", 64)
    assert choice.tokens % 1024 == 0
    assert footprint.total_fixed + choice.tokens * footprint.token <= SHARE["cuda"] * total
    more = footprint.total_fixed + (choice.tokens + 1024) * footprint.token
    assert more > SHARE["cuda"] * total or choice.tokens == MOST_TOKENS["cuda"]


def test_it_says_why() -> None:
    footprint = training(recipe(), config("8B"), BF16, "cuda")
    assert "the most that fit 85% of 80.0 GB beside 18." in largest(footprint, 80 * GB, "cuda", 64).why
    assert "more would fit" in largest(footprint, 1e15, "cuda", 64).why
    long = largest(footprint, 1e15, "cuda", 100_000)
    assert long.tokens == 100_000 and "data.max_length" in long.why
    tight = largest(footprint, 24 * GB, "cuda", 4096)
    assert (
        tight.tokens == 4096 and "set train.activation_checkpointing: selective, or lower data.max_length" in tight.why
    )


def test_a_device_that_is_too_small_is_an_error_with_the_remedy() -> None:
    for changes, total in (({}, 8 * GB), (FULL, 80 * GB)):
        footprint = training(recipe(**changes), config("8B"), BF16, "cuda")
        with pytest.raises(RecipeError, match=r"train.microbatch_tokens: auto finds none.*model.load_in_4bit: true"):
            largest(footprint, total, "cuda", 2048)
    paged = {**FULL, "train.optim": "paged_adamw_32bit", "train.param_dtype": "bfloat16"}
    assert tokens("8B", 80 * GB, max_length=512, **paged) == 512, "the state of the optimizer leaves the device"


def test_a_cpu_keeps_its_size_where_there_is_room() -> None:
    footprint = training(recipe(), config("56M"), FP32, "cpu")
    assert largest(footprint, 16 * GB, "cpu", 512).tokens == 4096
    assert largest(footprint, 16 * GB, "cpu", 8192).tokens == 8192
    assert largest(footprint, 2 * GB, "cpu", 512).tokens < 4096
    assert largest(footprint, 2 * GB, "cpu", 512).tokens >= 512


# --- the machine ---


def test_the_limits_of_control_groups_are_those_of_the_widest_too(tmp_path: Path) -> None:
    def limits(own: str) -> list[int]:
        (tmp_path / "cgroup").write_text(own)
        return sorted(memory._limits(tmp_path / "cgroup", tmp_path / "fs"))

    inner = tmp_path / "fs/outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "fs/outer/memory.max").write_text("5000\n")
    (inner / "memory.max").write_text("max\n")
    assert limits("0::/outer/inner\n") == [5000]
    (inner / "memory.max").write_text("3000\n")
    (tmp_path / "fs/memory.max").write_text("4000\n")
    assert limits("0::/outer/inner\n") == [3000, 4000, 5000]
    assert limits("0::/elsewhere\n") == [4000], "a container sees its own group as the root"
    first = tmp_path / "fs/memory/job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("2000\n")
    assert limits("3:cpu,cpuacct:/job\n5:memory:/job\n") == [2000]
    assert memory._limits(tmp_path / "no-linux", tmp_path) == []


def test_the_memory_of_this_machine() -> None:
    assert 2**28 < memory.total_memory(torch.device("cpu")) < 2**45


def test_a_run_decides_once_and_says_so(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipes.load(recipe_file, [], stage="sft")
    whole = find_machine(given, resume=False)
    assert whole.recipe.train.microbatch_tokens == whole.microbatch.tokens == 4096
    footprint = training(given, LlamaConfig.from_pretrained(given.model.name_or_path), FP32, "cpu")
    room = (footprint.total_fixed + 1000 * footprint.token) / SHARE["cpu"]
    monkeypatch.setattr(memory, "total_memory", lambda _: room)
    assert microbatch(given, CPU).tokens == 960
    small = find_machine(given, resume=False).recipe
    assert small.train.microbatch_tokens == 960
    run = Path(given.train.output_dir)
    run.mkdir()
    (run / "recipe.yaml").write_text(recipes.dump(whole.recipe))
    resumed = find_machine(given, resume=True)
    assert resumed.recipe.train.microbatch_tokens == 4096, "another machine goes on with what was decided"
    asked = recipes.load(recipe_file, ["train.microbatch_tokens=77"], stage="sft")
    assert microbatch(asked, CPU) == memory.Choice(77, "as the recipe says")


def test_no_more_runs_at_once_than_the_longest_row_that_the_base_takes(recipe_file: Path) -> None:
    """A max_length that stands for "no limit" is no size of a microbatch: beyond 1,024 positions rows are refused."""
    given = recipes.load(recipe_file, ["data.max_length=1000000"], stage="sft")
    assert microbatch(given, CPU).tokens == 4096


def test_ranks_of_one_machine_share_its_memory_and_take_the_smallest(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipes.load(recipe_file, [], stage="sft")
    footprint = training(given, LlamaConfig.from_pretrained(given.model.name_or_path), FP32, "cpu")
    monkeypatch.setattr(
        memory, "total_memory", lambda _: (footprint.total_fixed + 3100 * footprint.token) / SHARE["cpu"]
    )
    assert microbatch(given, CPU).tokens == 3072
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert microbatch(given, CPU).tokens < 3072
    monkeypatch.delenv("LOCAL_WORLD_SIZE")

    class Rank(Devices):
        def agree(self, number: int) -> int:
            return max(number, -640)  # the other rank has room for 640

    assert microbatch(given, Rank(torch.device("cpu"), 0, 1)).tokens == 640


def test_the_adapter_that_is_gone_on_with_counts_as_it_was_made(tmp_path: Path) -> None:
    saved = {"peft_type": "LORA", "r": 128, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    mine = training(recipe(adapter={"path": str(tmp_path)}), config("1B"), BF16, "cuda")
    same = {"r": 128, "target_modules": ("q_proj",), "modules_to_save": ("lm_head",)}
    assert mine == training(recipe(adapter=same), config("1B"), BF16, "cuda")
    assert training(recipe(adapter={"path": str(tmp_path / "none")}), config("1B"), BF16, "cuda") == training(
        recipe(), config("1B"), BF16, "cuda"
    )
