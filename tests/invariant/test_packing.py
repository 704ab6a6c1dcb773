"""Invariant 3: a packed, prefix-shared row gives the log-probabilities and gradients of its documents alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tuner.data.pack import pack
from tuner.model.fuse import fuse
from tuner.model.policy import Policy
from tuner.types import Batch, Segment, Tokens, span

Pack = Callable[[list[Tokens]], Batch]


def sequences(sample: Tokens) -> list[tuple[Tensor, Tensor]]:
    """(ids, weight as a target of each) of every sequence of a sample, the trunk repeated for each branch."""
    found = []
    for spans in [(*sample.trunk, *b) for b in sample.branches] or [sample.trunk]:
        ids = torch.cat([torch.as_tensor(s.ids).long() for s in spans])
        weights = torch.cat([torch.full((len(s.ids),), s.weight if s.trained else 0.0) for s in spans])
        found.append((ids, weights))
    return found


def check(lm: nn.Module, samples: list[Tokens], make_batch: Pack = pack, attention: str = "tuner_varlen") -> None:
    """Per-token losses to 1e-6, per-parameter gradients to 1e-5 of their norm, against plain transformers."""
    lm, plain = copy.deepcopy(lm), copy.deepcopy(lm)
    logps, losses = [], []
    for sample in samples:
        for ids, weights in sequences(sample):
            row = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            own = row[:-1].gather(1, ids[1:, None])[:, 0]
            logps.append(own[weights[1:] != 0].detach())
            losses.append(-(own * weights[1:]).sum())
    torch.stack(losses).sum().backward()
    fuse(lm)
    policy = Policy(lm, compute_dtype=torch.float32, attn_implementation=attention)
    batch = make_batch(samples)
    mine = policy(batch)
    torch.testing.assert_close(mine.detach(), torch.cat(logps), rtol=1e-6, atol=1e-6)
    (-(mine * batch.weights).sum()).backward()
    for (name, p), (_, q) in zip(lm.named_parameters(), plain.named_parameters(), strict=True):
        if q.requires_grad:
            assert p.grad is not None and q.grad is not None, name
            assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()), name


@pytest.fixture
def chats(random_samples: Callable[..., list[Tokens]]) -> list[Tokens]:
    samples = random_samples(7)
    samples[3] = dataclasses.replace(samples[3], trunk=(*samples[3].trunk, span([30, 31, 32], True, 0.3)))
    return samples


@pytest.fixture
def pairs() -> list[Tokens]:
    """Preference samples: two or three branches over one trunk, tool results untrained inside a branch."""
    g = torch.Generator().manual_seed(1)

    def some(n: int, trained: bool) -> object:
        return span(torch.randint(24, 300, (n,), generator=g), trained)

    def branch(n: int) -> tuple[object, ...]:
        return (some(n, True), some(3, False), some(2, True))

    return [
        Tokens((some(9, False),), (branch(5), branch(8))),  # type: ignore[arg-type]
        Tokens((some(1, False),), (branch(1), branch(2), (some(3, False), some(4, True)))),  # type: ignore[arg-type]
        Tokens((some(20, False), some(4, True))),  # type: ignore[arg-type]
    ]


@pytest.fixture(params=["full", "lora"])
def lm(request: pytest.FixtureRequest, make_model: Callable[..., LlamaForCausalLM]) -> nn.Module:
    base = make_model()
    if request.param == "full":
        return base
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def set_mode(lm: nn.Module, mode: str) -> nn.Module:
    if mode == "checkpointed":
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore
    return lm.train(mode != "eval")


modes = pytest.mark.parametrize("mode", ["train", "eval", "checkpointed"])


@modes
@pytest.mark.parametrize("attention", ["tuner_varlen", "sdpa", "eager"])
def test_packed_chats(lm: nn.Module, chats: list[Tokens], attention: str, mode: str) -> None:
    check(set_mode(lm, mode), chats, attention=attention)
    check(lm, chats[::-1], attention=attention)


@modes
def test_shared_prefixes(lm: nn.Module, chats: list[Tokens], pairs: list[Tokens], mode: str) -> None:
    check(set_mode(lm, mode), [pairs[0], chats[0], *pairs[1:], chats[1]])


# --- mutants: batches that are wrong in the ways this field gets wrong ---


def documents_see_each_other(samples: list[Tokens]) -> Batch:
    batch = pack(samples)
    n = batch.num_tokens
    return dataclasses.replace(batch, plan=(Segment((0, n), ((0, n),)),))


def branches_see_each_other(samples: list[Tokens]) -> Batch:
    """Each branch sees all of its document before it, the other branches too."""
    batch = pack(samples)
    starts = {int(d): int((batch.doc_ids == d).nonzero()[0]) for d in batch.doc_ids.unique()}

    def wider(s: Segment) -> Segment:
        start = starts[int(batch.doc_ids[s.query[0]])]
        return Segment(s.query, s.keys if start == s.query[0] else ((start, s.query[0]), s.query))

    return dataclasses.replace(batch, plan=tuple(map(wider, batch.plan)))


def branches_do_not_continue_their_trunk(samples: list[Tokens]) -> Batch:
    batch = pack(samples)
    return dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))


def branches_start_from_the_token_before_them(samples: list[Tokens]) -> Batch:
    """What label shifting says: the first token of the second branch follows the last of the first."""
    batch = pack(samples)
    second = next(s for s in batch.plan if int(batch.branch_ids[s.query[0]]) == 2)
    moved = (batch.predict_at == second.keys[0][1] - 1) & (batch.seq_branch[batch.seq_ids] == 2)
    assert int(moved.sum()) == 1
    return dataclasses.replace(batch, predict_at=batch.predict_at.masked_fill(moved, second.query[0] - 1))


def seams_are_predicted(samples: list[Tokens]) -> Batch:
    """The last token of each document also predicts the first of the next one."""
    batch = pack(samples)
    seam = int((batch.doc_ids == 1).nonzero()[0])
    return dataclasses.replace(
        batch,
        predict_at=torch.cat([batch.predict_at, torch.tensor([seam - 1])]),
        targets=torch.cat([batch.targets, batch.input_ids[seam : seam + 1]]),
        weights=torch.cat([batch.weights, torch.ones(1)]),
        seq_ids=torch.cat([batch.seq_ids, torch.zeros(1, dtype=torch.int64)]),
    )


def weights_are_ignored(samples: list[Tokens]) -> Batch:
    batch = pack(samples)
    return dataclasses.replace(batch, weights=torch.ones_like(batch.weights))


MUTANTS = [
    documents_see_each_other,
    branches_see_each_other,
    branches_do_not_continue_their_trunk,
    branches_start_from_the_token_before_them,
    seams_are_predicted,
    weights_are_ignored,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.__name__ for m in MUTANTS])
def test_mutants(
    mutant: Pack, make_model: Callable[..., LlamaForCausalLM], chats: list[Tokens], pairs: list[Tokens]
) -> None:
    samples = [pairs[0], chats[3], *pairs[1:]]
    check(make_model(), samples)
    with pytest.raises(AssertionError):
        check(make_model(), samples, mutant)
