"""Twenty steps of AdamW against a trainer in plain torch: losses to 1e-6, parameters to 1e-5."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tuner import recipe as recipes
from tuner.stages import sft

STEPS = 20
LEARNING_RATE = 1e-3
Row = tuple[list[int], list[bool]]  # ids, and which of them are trained


# --- the reference: nothing of tuner below this line, up to the next ---


def encode(line: str, tokenizer: PreTrainedTokenizerFast) -> Row:
    """A chat in Llama 3's format, each answer trained up to and with its <|eot_id|>."""
    ids, trained = [tokenizer.convert_tokens_to_ids("<|begin_of_text|>")], [False]
    for message in json.loads(line)["messages"]:
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        for text, is_answer in ((header, False), (f"{message['content'].strip()}<|eot_id|>", True)):
            part = tokenizer(text, add_special_tokens=False).input_ids
            ids += part
            trained += [is_answer and message["role"] == "assistant"] * len(part)
    return ids, trained


def step_loss(lm: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Mean over all trained tokens of the step, from a right-padded batch with an attention mask."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [7] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor(
        [[i if t else -100 for i, t in zip(*row, strict=True)] + [-100] * (longest - len(row[0])) for row in rows]
    )
    logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def train(lm: nn.Module, rows: Sequence[Row], *, weight_decay: float) -> tuple[list[float], list[float]]:
    """(losses, gradient norms before clipping) of full-batch AdamW at a constant rate, clipped to 1."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    embedding = lm.get_input_embeddings().weight  # type: ignore[operator]
    matrices = [p for p in trained if p.ndim == 2 and p is not embedding]
    others = [p for p in trained if p.ndim != 2 or p is embedding]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        foreach=False,
    )
    losses, norms = [], []
    lm.train()
    for _ in range(STEPS):
        loss = step_loss(lm, rows)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


# --- the comparison ---


@pytest.fixture
def rows(chats_file: Path, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    return [encode(line, tokenizer) for line in chats_file.read_text().splitlines()]


def run(recipe_file: Path, output: Path, extra: Sequence[str]) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of the same run by a recipe."""
    settings = {
        "train.output_dir": output,
        "train.batch_size": 22,
        "train.max_steps": STEPS,
        "train.learning_rate": LEARNING_RATE,
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
        "train.max_grad_norm": 1.0,
        "train.microbatch_tokens": 500,
    }
    sft.run(recipes.load(recipe_file, [*(f"{k}={v}" for k, v in settings.items()), *extra]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def assert_same(
    mine: tuple[list[float], list[float]], theirs: tuple[list[float], list[float]], relative: float = 1e-6
) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=relative)
    assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
    assert theirs[0][-1] < 0.9 * theirs[0][0] and max(theirs[1]) > 1.0, "it learns, and clipping has something to clip"


def assert_parameters(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, other in theirs.items():
        assert float((mine[name] - other).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_full_fine_tuning(
    recipe_file: Path, tiny_model_dir: Path, rows: list[Row], tmp_path: Path, weight_decay: float
) -> None:
    lm = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    theirs = train(lm, rows, weight_decay=weight_decay)
    mine = run(recipe_file, tmp_path / "full", ["adapter=null", f"train.weight_decay={weight_decay}"])
    assert_same(mine, theirs)
    assert_parameters(load_file(tmp_path / "full" / "model" / "model.safetensors"), lm.state_dict())


@pytest.fixture
def start(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, Callable[[], PeftModel]]:
    """An adapter on disk to start from, and peft's own way to load it for training."""
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "start"))

    def load() -> PeftModel:
        base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        return PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)

    return tmp_path / "start", load


def test_lora(recipe_file: Path, rows: list[Row], tmp_path: Path, start: tuple[Path, Callable[[], PeftModel]]) -> None:
    directory, load = start
    lm = load()
    theirs = train(lm, rows, weight_decay=0.0)
    text = recipe_file.read_text().replace("adapter: {r: 4, lora_alpha: 8}", f"adapter: {{path: {directory}}}")
    recipe_file.write_text(text)
    assert_same(run(recipe_file, tmp_path / "lora", []), theirs)
    lm.save_pretrained(str(tmp_path / "theirs"))
    mine = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert_parameters(mine, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))


def test_mutant_prompts_are_trained_too(
    recipe_file: Path, tiny_model_dir: Path, rows: list[Row], tmp_path: Path
) -> None:
    lm = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    theirs = train(lm, [(ids, [i > 0 for i in range(len(ids))]) for ids, _ in rows], weight_decay=0.0)
    with pytest.raises(AssertionError):
        assert_same(run(recipe_file, tmp_path / "full", ["adapter=null"]), theirs)
