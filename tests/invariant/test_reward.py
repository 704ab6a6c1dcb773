"""Invariants 3, 4, 6 and 8 for reward models, and their start: each pair at ln 2, whatever the starting point."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import SENTENCES
from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.errors import RecipeError
from tuner.model import load
from tuner.model.reward import RewardModel
from tuner.stages import prepare, reward, sft
from tuner.stages.reward import Reward
from tuner.train.loop import Loop, Taken
from tuner.train.session import Session
from tuner.types import Batch, Tokens, span

LN2 = math.log(2)


@pytest.fixture
def lists_file(tmp_path: Path) -> Path:
    """20 prompts with two to four answers of very different lengths, the best one first."""
    rng, words = np.random.default_rng(0), " ".join(SENTENCES).split()

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count))

    rows = [
        {"prompt": say(int(rng.integers(1, 20))), "completions": [say(1 + (i + 5 * k) % 9) for k in range(2 + i % 3)]}
        for i in range(20)
    ]
    file = tmp_path / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def rank(tiny_model_dir: Path, lists_file: Path, tmp_path: Path) -> Path:
    """A LoRA recipe over the lists: steps of 8 (three an epoch), fp32, one thread."""
    file = tmp_path / "reward.yaml"
    file.write_text(
        f"""
stage: reward
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {lists_file}, chat_template: llama3, max_length: 256}}
train: {{output_dir: {tmp_path}/reward, batch_size: 8, max_steps: 4, learning_rate: 5e-3, threads: 1}}
"""
    )
    return file


def run(rank: Path, output: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """Trains, and gives the lines of metrics.jsonl."""
    reward.run(recipes.load(rank, [f"train.output_dir={output}", *overrides], stage="reward"), resume=resume)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def result(output: Path) -> dict[str, Tensor]:
    (file,) = [*output.glob("adapter/adapter_model.safetensors"), *output.glob("model/model.safetensors")]
    return load_file(file)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= tolerance


# --- step 0 ---

STARTS = {
    "lora": [],
    "full": ["adapter=null", "train.learning_rate=1e-3"],
    "dora": ["adapter.use_dora=true"],
    "pissa": ["adapter.init_lora_weights=pissa"],
    "qlora": ["model.load_in_4bit=true"],
}


@pytest.fixture
def first_rewards(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The rewards of each microbatch, from the first one on."""
    seen: list[Tensor] = []
    scores = Reward.scores

    def noted(self: Reward, *given: Any) -> Tensor:
        found = scores(self, *given)
        seen.append(found.detach())
        return found

    monkeypatch.setattr(Reward, "scores", noted)
    return seen


def assert_starts_at_ln_2(lines: list[dict[str, Any]], rewards: list[Tensor]) -> None:
    assert not rewards[0].any()
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert lines[0]["accuracy"] == 0.5  # ties count half
    assert abs(lines[1]["margin"]) > 1e-4, "the head has moved"


@pytest.mark.parametrize("start", STARTS)
def test_every_pair_starts_at_ln_2(start: str, rank: Path, tmp_path: Path, first_rewards: list[Tensor]) -> None:
    assert_starts_at_ln_2(run(rank, tmp_path / "run", *STARTS[start]), first_rewards)


def sft_run(recipe_file: Path, tmp_path: Path, *overrides: str) -> str:
    """An SFT run of the same base, as the adapter section that goes on with it."""
    sft.run(recipes.load(recipe_file, [f"train.output_dir={tmp_path}/sft", "train.learning_rate=5e-2", *overrides]))
    return "adapter={path: " + f"{tmp_path}/sft" + "}"


def test_an_sft_adapter_starts_there_too_and_without_dropout(
    rank: Path, recipe_file: Path, tiny_model_dir: Path, tmp_path: Path, first_rewards: list[Tensor]
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tiny_model_dir / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    again = sft_run(recipe_file, tmp_path, "adapter.lora_dropout=0.3")
    assert_starts_at_ln_2(run(rank, tmp_path / "run", again), first_rewards)
    found = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert found["lora_dropout"] == 0.0 and found["task_type"] == "SEQ_CLS"
    sent, trained = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("sft", "run"))
    assert set(trained) - set(sent) == {"base_model.model.score.weight"}
    with pytest.raises(RecipeError, match=r"adapter.lora_dropout.*set it to 0"):
        recipes.load(rank, ["adapter.lora_dropout=0.1"], stage="reward")


def test_mutant_a_head_from_chance(
    rank: Path, tmp_path: Path, first_rewards: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.nn.init, "zeros_", lambda weight: weight)  # nn.Linear has filled it with noise
    with pytest.raises(AssertionError):
        assert_starts_at_ln_2(run(rank, tmp_path / "run"), first_rewards)


# --- the trajectory ---

LOSSES = {
    "pairwise": "loss={type: bradley_terry, centring: 0.01}",
    "listwise": "loss.type=plackett_luce",
}


def split_two_ways(rank: Path, tmp_path: Path, loss: str) -> None:
    """Twelve steps, each at once and in uneven microbatches, must end with the same weights."""
    for name, split in (("one", "train.microbatch_tokens=100000"), ("parts", "train.microbatch_tokens=200")):
        run(rank, tmp_path / name, loss, split, "train.learning_rate=1e-4", "train.max_steps=12")
    assert_same(result(tmp_path / "one"), result(tmp_path / "parts"), 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_do_not_matter(loss: str, rank: Path, tmp_path: Path) -> None:
    split_two_ways(rank, tmp_path, LOSSES[loss])


def test_mutant_a_mean_over_each_microbatch(rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Reward.whole_losses

    def means(self: Reward, scores: Tensor, constants: Tensor) -> dict[str, Tensor]:
        return {name: value / len(scores) for name, value in sums(self, scores, constants).items()}

    monkeypatch.setattr(Reward, "whole_losses", means)
    with pytest.raises(AssertionError):
        split_two_ways(rank, tmp_path, LOSSES["pairwise"])


def stop_and_go_on(rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """A run stopped before its fourth step and resumed must end with the bytes of the uninterrupted one."""
    extra = [*overrides, "log.save_steps=1", "train.max_steps=6"]
    run(rank, tmp_path / "whole", *extra)
    step = Loop.step

    def stopping(loop: Loop, number: int) -> Taken:
        if number == 3:
            raise KeyboardInterrupt
        return step(loop, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "step", stopping)
        run(rank, tmp_path / "parts", *extra)
    run(rank, tmp_path / "parts", *extra, resume=True)
    assert_same(result(tmp_path / "whole"), result(tmp_path / "parts"))


@pytest.mark.parametrize("start", ["lora", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(
    start: str, rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_go_on(rank, tmp_path, monkeypatch, *STARTS[start])


def test_mutant_a_head_that_is_not_restored(rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Session._load_weights

    def headless(self: Session, weights: dict[str, Tensor], place: Path) -> None:
        score = {name: p.detach().clone() for name, p in self.trainable().items() if "score" in name}
        restore(self, weights | score, place)

    monkeypatch.setattr(Session, "_load_weights", headless)
    with pytest.raises(AssertionError):
        stop_and_go_on(rank, tmp_path, monkeypatch)


# --- the result ---

# What a user of the result would write. It must not need tuner.
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

request = json.loads(sys.stdin.read())
answers = {}
for name, path in request["results"].items():
    tokenizer = AutoTokenizer.from_pretrained(path)
    if path.endswith("model"):
        lm = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto")
        assert lm.config.num_labels == 1
    else:
        options = {}
        if name == "qlora":
            four = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
            options = {"quantization_config": four}
        base = AutoModelForSequenceClassification.from_pretrained(
            request["base"], num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, **options
        )
        lm = PeftModel.from_pretrained(base, path)
    # On some CPUs bitsandbytes evaluates in bf16 whatever it was asked; no dropout is at work in training mode.
    lm.train(name == "qlora")
    pad = request["pad"] if name.startswith("mutant") else tokenizer.pad_token_id
    lm.config.pad_token_id = pad
    longest = max(map(len, request["rows"]))
    rows = torch.tensor([row + [pad] * (longest - len(row)) for row in request["rows"]])
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in request["rows"]])
    with torch.no_grad():
        answers[name] = lm(input_ids=rows, attention_mask=seen).logits[:, 0].float().tolist()
assert not any(name.partition(".")[0] == "tuner" for name in sys.modules)
print(json.dumps(answers))
"""
END = 4  # <|eot_id|>


def rows() -> list[list[int]]:
    """Rows of very different lengths, each with its terminator."""
    g = torch.Generator().manual_seed(0)
    return [[0, *torch.randint(24, 300, (n,), generator=g).tolist(), END] for n in (3, 40, 11, 25)]


def train(rank: Path, output: Path, extra: list[str], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs a recipe; the rewards of the rows by the model as it stood when training ended."""
    ended: list[RewardModel] = []
    load_model = prepare.load_model

    def load_and_keep(*args: Any) -> prepare.Model[RewardModel]:
        model: prepare.Model[RewardModel] = load_model(*args)
        ended.append(model.policy)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_model", load_and_keep)
        run(rank, output, *extra)
    samples = [Tokens((span(row[:2], False),), ((span(row[2:], True),),)) for row in rows()]
    with torch.no_grad():
        return [float(r) for r in ended[-1].eval()(pack(samples))]


def fresh(base: Path, results: Mapping[str, Path], cwd: Path) -> dict[str, list[float]]:
    request = {"base": str(base), "rows": rows(), "pad": END, "results": {k: str(v) for k, v in results.items()}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(request), capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_the_result_gives_the_same_rewards_in_a_fresh_process(
    rank: Path, recipe_file: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched and padded, by plain transformers and peft; with the terminator as padding they are others."""
    kinds = STARTS | {"continued": [sft_run(recipe_file, tmp_path)]}
    wanted, results = {}, {}
    for kind, extra in kinds.items():
        wanted[kind] = train(rank, tmp_path / kind, extra, monkeypatch)
        results[kind] = tmp_path / kind / ("model" if kind == "full" else "adapter")
    answers = fresh(tiny_model_dir, results | {"mutant": results["lora"]}, tmp_path)
    for kind in kinds:
        assert np.ptp(wanted[kind]) > 1e-3
        assert answers[kind] == pytest.approx(wanted[kind], abs=2e-5 if kind == "qlora" else 1e-5), kind
    assert answers["mutant"] != pytest.approx(wanted["lora"], abs=1e-3)


def test_the_files_say_which_padding_is_safe(rank: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A checkpoint whose padding is its terminator comes out with another one, and with its head in fp32."""
    settings = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    (tiny_model_dir / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|eot_id|>"}))
    run(rank, tmp_path / "run", *STARTS["full"])
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] == 7
    settings = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|finetune_right_pad_id|>"
    assert result(tmp_path / "run")["score.weight"].dtype == torch.float32


# --- what the stage reads ---


def test_evaluation_does_not_depend_on_how_it_is_batched(rank: Path, lists_file: Path, tmp_path: Path) -> None:
    held_out = f"data.eval={lists_file}"
    one = run(rank, tmp_path / "one", held_out, "train.microbatch_tokens=100000")
    parts = run(rank, tmp_path / "parts", held_out, "data.packing=false", "train.microbatch_tokens=257")
    for a, b in zip(one, parts, strict=True):
        shared = [key for key in a if key.startswith("eval_")]
        assert [a[key] for key in shared] == pytest.approx([b[key] for key in shared], abs=1e-5)
    assert {"eval_loss", "eval_accuracy", "eval_longer_is_better", "eval_calibration_error"} <= set(one[-1])


def test_every_answer_is_read_at_its_own_end(rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens at `seq_end` of every batch that trains are terminators, one for each answer."""
    seen: list[Batch] = []
    forward = RewardModel.forward
    monkeypatch.setattr(RewardModel, "forward", lambda self, batch: seen.append(batch) or forward(self, batch))
    run(rank, tmp_path / "run")
    assert len(seen) >= 4
    for batch in seen:
        assert (batch.input_ids[batch.seq_end] == END).all()
        assert len(batch.seq_end) == len(set(zip(batch.seq_doc.tolist(), batch.seq_branch.tolist(), strict=True)))
