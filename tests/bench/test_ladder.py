"""The ladders take ideas away and nothing else: without them a step costs more and gives the same loss."""

from __future__ import annotations

from typing import Any

import dpo
import pytest
import sft
import synthetic
import torch
import workplace
from models import SHAPES

from tuner.data.pack import pack
from tuner.model import fuse

SHAPE, CPU = SHAPES["tiny"], torch.device("cpu")


def policy() -> Any:
    return synthetic.make_policy(SHAPE, synthetic.Method(), CPU, torch.float32, 512)


def test_scoring_every_position_gives_the_same_loss() -> None:
    samples = synthetic.documents([40, 24, 56], SHAPE.vocab, trained=0.3)
    stage, model = synthetic.LanguageStage(), policy()
    batch, every = pack(samples), sft._all_scored(pack)(samples)
    assert every.num_predictions == batch.num_tokens - 1 > 2 * batch.num_predictions
    losses = [float(stage.losses(model, b, samples)["nll"].detach()) for b in (batch, every)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_prompt_run_for_each_answer_gives_the_same_sums() -> None:
    samples = synthetic.preference_pairs(3, SHAPE.vocab, 60, 2.15)
    model = policy()
    batch, apart = pack(samples), dpo._unshared(pack)(samples)
    assert apart.num_tokens == sum(len(synthetic.apart(s)) for s in samples) > batch.num_tokens
    sums = [b.per_sequence(model(b)).detach() for b in (batch, apart)]
    assert torch.equal(batch.seq_doc, apart.seq_doc) and torch.equal(batch.seq_branch, apart.seq_branch)
    assert torch.allclose(sums[0], sums[1], rtol=1e-5)


@pytest.mark.parametrize("rung", sft.LADDER)
def test_a_rung_has_the_fused_modules_of_its_ideas(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.data import pack as module

    monkeypatch.setattr(fuse, "FUSED", dict(fuse.FUSED))
    monkeypatch.setattr(fuse, "LAST", dict(fuse.LAST))
    monkeypatch.setattr(module, "pack", module.pack)
    taken = sft.LADDER[rung]["without"]
    before = module.pack
    sft._without(taken)
    swapped = fuse.fuse(synthetic.adapted(synthetic.random_llama(SHAPE, CPU, torch.float32, 64, "lora")))
    assert ("FusedLoraLinear" in swapped) == ("lora" not in taken)
    assert ("FusedLlamaRMSNorm" in swapped) == ("modules" not in taken)
    assert ("LastLlamaDecoderLayer" in swapped) == ("modules" not in taken)
    assert (module.pack is before) == ("answers" not in taken)


def test_rates_leave_the_first_steps_out() -> None:
    clock = workplace.Clock()
    clock.times, clock.tokens, clock.losses = [0.0, 10.0, 11.0, 13.0], [5, 100, 200], [3.0, 2.0, 1.0]
    found = clock.result(warm_up=1, pairs=4)
    assert found["tokens_per_second"] == 300 / 3 and found["pairs_per_second"] == 8 / 3
    assert found["warm_up_seconds"] == 10.0 and found["steps"] == 2 and found["first_losses"] == [3.0, 2.0, 1.0]
    assert "padded_tokens_per_second" not in found
