"""KTO and WPO from text to gradients are those of TRL 1.16's trainers, on a tiny random Llama in fp32.

TRL tokenises, pairs each prompt with the answer before it for the KL estimate, batches with padding and scores; ours
packs the same tokens with shared prompts. One thing is TRL's own and left out: it makes those pairs within the batch of
a device, so that its estimate moves with the number of devices and of accumulated microbatches; here one batch is the
step, where both say the same.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tuner.data.pack import pack
from tuner.losses import preference
from tuner.model.policy import Policy
from tuner.stages.judged import ProbingJudged
from tuner.stages.pairs import DPO
from tuner.train.loop import inform
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens, span

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under TRL

WORDS = "The cat sat on the mat and looked at the moon What is the capital of the country".split()
ROWS = 8
Make = Callable[..., LlamaForCausalLM]
ALONE = Devices(torch.device("cpu"), 0, 1)
COMMON: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
    "per_device_train_batch_size": ROWS,
}


def rows(*columns: str) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [{"prompt": say(5, 20), **{name: " " + say(1, 30) for name in columns}} for _ in range(ROWS)]


def drifted(make_model: Make) -> LlamaForCausalLM:
    """The reference: the model moved a little, so that the KL estimate is above its bound."""
    lm, g = make_model(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    return lm


def reference_of(lm: LlamaForCausalLM) -> Callable[[Batch, Sequence[Tokens]], Tensor]:
    frozen = Policy(copy.deepcopy(lm), compute_dtype=torch.float32)

    def score(batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        with torch.no_grad():
            return frozen(batch)

    return score


def check(mine: Tensor, lm: LlamaForCausalLM, theirs: Tensor, other: LlamaForCausalLM) -> None:
    """Losses to 1e-6, gradients of each parameter to 1e-5 of their norm."""
    assert float((mine - theirs).abs().detach()) <= 1e-6 * max(1.0, float(theirs.abs().detach()))
    mine.backward()
    theirs.backward()
    for (name, a), (_, b) in zip(lm.named_parameters(), other.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad - b.grad).norm()) <= 1e-5 * float(b.grad.norm()), name


def kto(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, output: Path
) -> tuple[Tensor, LlamaForCausalLM, Tensor, LlamaForCausalLM]:
    weights = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    data = [row | {"label": i % 3 != 0} for i, row in enumerate(rows("completion"))]
    other, base = make_model(), drifted(make_model)
    trainer = KTOTrainer(
        other,
        copy.deepcopy(base),
        args=KTOConfig(output_dir=str(output), **weights, **COMMON),
        train_dataset=Dataset.from_list(data),
        processing_class=copy.deepcopy(tokenizer),
    )
    found = list(trainer.train_dataset)
    theirs = trainer.compute_loss(other, trainer.data_collator(found))
    samples = [
        Tokens(
            (span(row["prompt_ids"], False),),
            ((span(row["completion_ids"], True),),),
            "rows",
            i,
            (float(row["label"]),),
        )
        for i, row in enumerate(found)
    ]
    lm = make_model()
    policy = Policy(lm, compute_dtype=torch.float32)
    stage = ProbingJudged(preference.resolve("kto", weights), reference_of(base))
    informed = inform(stage, policy, samples, 150, ALONE)
    sums = informed.losses(policy, pack(samples), samples)
    assert float(sums["kl_estimate"]) > 0, "the estimate is at its bound, and so says nothing"
    return sums["kto"] / ROWS, lm, theirs, other


def test_kto(make_model: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check(*kto(make_model, tokenizer, tmp_path))


def test_mutant_kto_of_another_estimate(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.stages.judged.mismatches", lambda prompts: tuple((i, i) for i in range(len(prompts))))
    with pytest.raises(AssertionError):
        check(*kto(make_model, tokenizer, tmp_path))


@pytest.mark.parametrize("weighting", ["sampled", "plain"])
def test_wpo(weighting: str, make_model: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL has the sampled weights; of the plain ones the same check says that they are others."""
    other, base = make_model(), drifted(make_model)
    trainer = DPOTrainer(
        other,
        copy.deepcopy(base),
        args=DPOConfig(output_dir=str(tmp_path), use_weighting=True, beta=0.2, **COMMON),
        train_dataset=Dataset.from_list(rows("chosen", "rejected")),
        processing_class=copy.deepcopy(tokenizer),
    )
    found = list(trainer.train_dataset)
    theirs = trainer.compute_loss(other, trainer.data_collator(found))
    samples = [
        Tokens(
            (span(row["prompt_ids"], False),),
            tuple((span(row[f"{side}_ids"], True),) for side in ("chosen", "rejected")),
        )
        for row in found
    ]
    lm = make_model()
    policy = Policy(lm, compute_dtype=torch.float32)
    stage = DPO(preference.resolve("sigmoid", {"beta": 0.2, "wpo": weighting}), reference_of(base))
    mine = stage.losses(policy, pack(samples), samples)["sigmoid"] / ROWS
    if weighting == "sampled":
        check(mine, lm, theirs, other)
    else:
        with pytest.raises(AssertionError):
            check(mine, lm, theirs, other)
