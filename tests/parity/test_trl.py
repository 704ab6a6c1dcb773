"""The SFT loss and gradients are those of TRL's SFTTrainer, on a tiny random Llama in fp32."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tuner.data.pack import pack
from tuner.losses import language
from tuner.model.fuse import fuse
from tuner.model.policy import Policy
from tuner.stages.sft import SFT
from tuner.types import Tokens, span

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under TRL

WORDS = "The cat sat on the mat and looked at the moon What is the capital of the country".split()


def rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [{"prompt": say(5, 20), "completion": " " + say(1, 30)} for _ in range(count)]


def trl_trainer(lm: nn.Module, tokenizer: PreTrainedTokenizerFast, output: Path, **options: object) -> SFTTrainer:
    config = SFTConfig(
        output_dir=str(output),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=8,
        **options,
    )
    data = Dataset.from_list(rows(8))
    return SFTTrainer(lm, config, train_dataset=data, processing_class=copy.deepcopy(tokenizer))


def samples_of(trainer: SFTTrainer) -> list[Tokens]:
    """TRL's own tokens: each row's ids, the completion trained."""
    samples = []
    for row in trainer.train_dataset:
        cut = sum(label == -100 for label in row["labels"])
        assert row["labels"] == [-100] * cut + row["input_ids"][cut:] and cut > 0
        samples.append(Tokens((span(row["input_ids"][:cut], False), span(row["input_ids"][cut:], True))))
    return samples


def check(lm: nn.Module, tokenizer: PreTrainedTokenizerFast, output: Path, stage: SFT) -> None:
    theirs, mine = lm.train(), copy.deepcopy(lm)
    trainer = trl_trainer(theirs, tokenizer, output)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    their_loss = trainer.compute_loss(theirs, dict(batch))
    their_loss.backward()
    fuse(mine)
    samples = samples_of(trainer)
    sums = stage.losses(Policy(mine, compute_dtype=torch.float32), pack(samples), samples)
    loss = sums["nll"] / stage.denominators(samples)["nll"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-6)
    for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert float((p.grad - q.grad).abs().max()) <= 1e-5, name
            assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()), name


@pytest.fixture(params=["full", "lora"])
def lm(request: pytest.FixtureRequest, make_model: Callable[..., LlamaForCausalLM]) -> nn.Module:
    if request.param == "full":
        return make_model()
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(make_model(), config)


def test_loss_and_gradients_are_trls(lm: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check(lm, tokenizer, tmp_path, SFT(language.resolve("nll", {})))


def test_mutant_a_mean_of_sequence_means(lm: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class SequenceMeans(SFT):
        def denominators(self, samples: object) -> dict[str, float]:
            return {"nll": float(len(samples))}  # type: ignore[arg-type]

        def losses(self, policy: object, batch: object, samples: object) -> dict[str, torch.Tensor]:
            logps = policy(batch)  # type: ignore[operator]
            counts = batch.per_sequence(torch.ones_like(logps))  # type: ignore[attr-defined]
            return {"nll": -(batch.per_sequence(logps) / counts).sum()}  # type: ignore[attr-defined]

    with pytest.raises(AssertionError):
        check(lm, tokenizer, tmp_path, SequenceMeans(language.resolve("nll", {})))
