"""A training step of the reward model is that of TRL 1.16's RewardTrainer, on a tiny random Llama in fp32.

TRL is right where its padding is no terminator. By its own default it pads with the EOS token wherever the tokenizer
names no padding, and that token also ends every answer: then transformers reads each reward one token too early.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from tests.conftest import tiny_config
from tests.parity.test_trl import WORDS
from tuner.data.pack import pack
from tuner.losses import reward
from tuner.model.fuse import fuse
from tuner.model.reward import RewardModel
from tuner.stages.reward import Reward
from tuner.types import Batch, Tokens, span

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under TRL


def rows(count: int, margins: bool) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    found = [{"prompt": say(5, 20), "chosen": " a" + say(1, 30), "rejected": " b" + say(1, 30)} for _ in range(count)]
    return [row | ({"margin": float(i % 4)} if margins else {}) for i, row in enumerate(found)]


def trl_trainer(
    lm: nn.Module, tokenizer: PreTrainedTokenizerFast, output: Path, margins: bool, centring: float | None
) -> RewardTrainer:
    config = RewardConfig(
        output_dir=str(output),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        center_rewards_coefficient=centring,
    )
    data = Dataset.from_list(rows(8, margins))
    return RewardTrainer(lm, config, train_dataset=data, processing_class=copy.deepcopy(tokenizer))


def samples_of(trainer: RewardTrainer) -> list[Tokens]:
    """TRL's own tokens: what both sides of a pair begin with is the trunk."""
    samples = []
    for row in trainer.train_dataset:
        sides = row["chosen_ids"], row["rejected_ids"]
        shared = next(i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b)
        assert shared > 4, "the prompt"
        branches = tuple((span(side[shared:], True),) for side in sides)
        samples.append(Tokens((span(sides[0][:shared], False),), branches, scores=(row.get("margin", 0.0), 0.0)))
    return samples


class OneTokenEarly(RewardModel):
    """Reads each reward from the token before the terminator."""

    def forward(self, batch: Batch) -> torch.Tensor:
        return super().forward(replace(batch, seq_end=batch.seq_end - 1))


def check(
    lm: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    *,
    margins: bool = False,
    centring: float | None = None,
    margin_weight: float = 1.0,
    kind: type[RewardModel] = RewardModel,
) -> None:
    """Losses equal to 1e-6 and gradients of every parameter to 1e-5."""
    theirs, mine = lm.train(), copy.deepcopy(lm)
    trainer = trl_trainer(theirs, tokenizer, output, margins, centring)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    their_loss = trainer.compute_loss(theirs, dict(batch))
    their_loss.backward()
    fuse(mine)
    samples = samples_of(trainer)
    parameters = {"margin_weight": margin_weight if margins else 0.0, "centring": centring or 0.0}
    stage = Reward(reward.resolve("bradley_terry", parameters))
    model = kind(mine, compute_dtype=torch.float32)  # type: ignore[arg-type]
    sums, counts = stage.losses(model, pack(samples), samples), stage.denominators(samples)
    loss = torch.stack([sums[term] / counts[term] for term in stage.terms]).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-6)
    for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()), name


@pytest.fixture(params=["full", "lora"])
def lm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(len(tokenizer), num_labels=1))
    if request.param == "full":
        return model
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    return get_peft_model(model, config)


@pytest.mark.parametrize("centring", [None, 0.01], ids=["", "centred"])
@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margin"])
def test_loss_and_gradients_are_trls(
    lm: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, margins: bool, centring: float | None
) -> None:
    check(lm, tokenizer, tmp_path, margins=margins, centring=centring)


def test_mutant_a_margin_of_half_the_weight(lm: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(lm, tokenizer, tmp_path, margins=True, margin_weight=0.5)


def test_where_the_padding_ends_the_answers_trl_reads_one_token_too_early(
    lm: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None  # TRL takes EOS, and ends the answers with it
    with pytest.raises(AssertionError):
        check(copy.deepcopy(lm), unpadded, tmp_path)
    check(lm, unpadded, tmp_path, kind=OneTokenEarly)
