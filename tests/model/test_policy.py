"""The policy against plain transformers: the same log-probabilities and gradients, whatever adapts or quantises it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tuner.data.pack import pack
from tuner.generate import generate
from tuner.model import fuse as fuse_module
from tuner.model.fuse import fuse
from tuner.model.policy import Policy
from tuner.types import Batch, Tokens, span

Make = Callable[..., LlamaForCausalLM]
Samples = Callable[..., list[Tokens]]


def plain_logps(lm: nn.Module, samples: list[Tokens]) -> Tensor:
    """Each sequence alone through plain transformers: no packing, no plan, no head of ours; `[M]` in row order."""
    parts = []
    for sample in samples:
        for spans in [sample.trunk] if not sample.branches else [(*sample.trunk, *b) for b in sample.branches]:
            ids = torch.cat([torch.as_tensor(s.ids).long() for s in spans])
            trained = torch.cat([torch.full((len(s.ids),), s.trained and s.weight != 0) for s in spans])
            logps = lm(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            own = logps[:-1].gather(1, ids[1:, None])[:, 0]
            parts.append(own[trained[1:]])
    return torch.cat(parts)


def grads(module: nn.Module) -> dict[str, Tensor]:
    found = {n.removeprefix("lm."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys()
    for name, other in theirs.items():
        assert float((mine[name] - other).norm()) <= tolerance * float(other.norm()), name


def pairs() -> list[Tokens]:
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(24, 300, (n,), generator=g).tolist()

    return [
        Tokens((span([0, *ids(n)], False),), ((span(ids(n + 3), True),), (span(ids(2), False), span(ids(4), True))))
        for n in (1, 6, 11)
    ]


def lora(base: nn.Module, **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("kind", ["full", "tied", "lora", "saved head"])
@pytest.mark.parametrize("branched", [False, True], ids=["chats", "pairs"])
def test_log_probabilities_and_gradients_are_those_of_plain_transformers(
    make_model: Make, random_samples: Samples, kind: str, branched: bool
) -> None:
    lm: nn.Module = make_model(tie_word_embeddings=kind == "tied")
    if kind == "lora":
        lm = lora(lm)
    elif kind == "saved head":
        lm = lora(lm, modules_to_save=["embed_tokens", "lm_head"])
    plain = copy.deepcopy(lm)
    fuse(lm)
    policy = Policy(lm, compute_dtype=torch.float32)
    samples = pairs() if branched else random_samples(6)
    mine, theirs = policy(pack(samples)), plain_logps(plain, samples)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    mine.sum().backward()
    theirs.sum().backward()
    assert_close(grads(policy), grads(plain))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("branched", [False, True], ids=["chats", "pairs"])
def test_every_attention_implementation_gives_the_same(
    make_model: Make, random_samples: Samples, name: str, branched: bool
) -> None:
    batch = pack(pairs() if branched else random_samples(6))
    lm = make_model()
    ours, other = Policy(copy.deepcopy(lm), compute_dtype=torch.float32), Policy(
        lm, compute_dtype=torch.float32, attn_implementation=name
    )  # fmt: skip
    a, b = ours(batch), other(batch)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    a.sum().backward()
    b.sum().backward()
    assert_close(grads(ours), grads(other))


@pytest.mark.parametrize("name", ["tuner_varlen", "sdpa", "eager"])
def test_a_sliding_window_is_measured_in_positions(random_samples: Samples, name: str) -> None:
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        sliding_window=9,
    )
    torch.manual_seed(0)
    lm = MistralForCausalLM(config)
    lm.set_attn_implementation("eager")
    samples = [*random_samples(4), *pairs()]
    with torch.no_grad():
        theirs = plain_logps(lm, samples)
        mine = Policy(lm, compute_dtype=torch.float32, attn_implementation=name)(pack(samples))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        lm.config.sliding_window = None
        lm.set_attn_implementation("eager")
        assert (plain_logps(lm, samples) - theirs).abs().max() > 1e-3, "the window matters for these lengths"


def test_the_head_is_the_one_that_trains(make_model: Make, random_samples: Samples) -> None:
    lm = lora(make_model(), modules_to_save=["lm_head"])
    policy = Policy(lm, compute_dtype=torch.float32)
    batch = pack(random_samples(2))
    with torch.no_grad():
        before = policy(batch)
        policy.head_weight().mul_(2.0)
        assert policy.head_weight().requires_grad
        assert (policy(batch) - before).abs().max() > 0.1
        with lm.disable_adapter():
            assert not policy.head_weight().requires_grad
            off = policy(batch)
        torch.testing.assert_close(off, plain_logps(make_model(), random_samples(2)), rtol=1e-6, atol=1e-6)


def test_full_weights_in_bf16_keep_fp32_masters(make_model: Make, random_samples: Samples) -> None:
    samples = random_samples(4)
    exact = Policy(make_model(), compute_dtype=torch.float32)
    policy = Policy(make_model(), compute_dtype=torch.bfloat16)
    a, b = policy(pack(samples)), exact(pack(samples))
    assert a.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.2
    a.sum().backward()
    b.sum().backward()
    mine = grads(policy)
    assert {g.dtype for g in mine.values()} == {torch.float32}
    assert_close(mine, grads(exact), tolerance=0.05)


def test_an_empty_batch_has_no_log_probabilities_and_no_gradient(make_model: Make) -> None:
    policy = Policy(make_model(), compute_dtype=torch.float32)
    logps = policy(pack([Tokens((span([5, 6, 7], False),))]))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(float(g.abs().max()) == 0 for g in grads(policy).values())


@pytest.mark.parametrize("training", [True, False])
def test_generation_mode_puts_everything_back(make_model: Make, random_samples: Samples, training: bool) -> None:
    lm = lora(make_model(), lora_dropout=0.3)
    fuse(lm)
    policy = Policy(lm, compute_dtype=torch.float32).train(training)
    batch = pack(random_samples(2))

    def draw() -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        return policy(batch), torch.rand(3)

    before = draw()
    torch.manual_seed(7)
    with policy.generation_mode() as inside:
        assert inside is lm and not lm.training and not torch.is_grad_enabled()
        assert policy.inner.config._attn_implementation == "sdpa"
        torch.rand(100)
        ids = generate(inside, [[0, 30, 31], [0, 40]], stop_ids=[1], pad_id=7, max_new_tokens=4)
    between = policy(batch), torch.rand(3)  # the generator is where it was
    after = draw()
    for logps, drawn in (between, after):
        assert torch.equal(logps, before[0]) and torch.equal(drawn, before[1])
    assert policy.training is training and lm.training is training and torch.is_grad_enabled()
    assert policy.inner.config._attn_implementation == policy.attn_implementation == "tuner_varlen"
    with pytest.raises(ZeroDivisionError), policy.generation_mode():
        raise ZeroDivisionError
    assert policy.inner.config._attn_implementation == "tuner_varlen" and policy.training is training
    prompt = torch.tensor([[0, 30, 31]])
    with policy.generation_mode() as inside:
        assert ids[0][0] == int(inside(input_ids=prompt).logits[0, -1].argmax())


def test_mutants_of_the_batch_are_noticed(make_model: Make) -> None:
    """The comparison with plain transformers is sharp: it sees a branch that does not continue its trunk."""
    policy, samples = Policy(make_model(), compute_dtype=torch.float32), pairs()
    batch = pack(samples)
    values = {f: getattr(batch, f) for f in Batch.__dataclass_fields__}
    mutant = Batch(**{**values, "position_ids": torch.arange(batch.num_tokens)})
    with torch.no_grad():
        wanted = plain_logps(make_model(), samples)
        torch.testing.assert_close(policy(batch), wanted, rtol=1e-6, atol=1e-6)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(policy(mutant), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_mlp_runs_where_it_is_read(make_model: Make, checkpointing: bool) -> None:
    """At the predicted positions alone, rounded up; and the result is that of a layer that runs everywhere."""
    lm = make_model()
    if checkpointing:
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    plain = Policy(copy.deepcopy(lm), compute_dtype=torch.float32).train()
    fuse(lm)
    policy = Policy(lm, compute_dtype=torch.float32).train()
    batch, seen = pack([*pairs(), Tokens((span(range(24, 224), False), span(range(24, 27), True)))]), []
    for layer in lm.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    found, wanted = policy(batch), plain(batch)
    rounded_up = -(-batch.num_predictions // 64) * 64
    assert seen == [batch.num_tokens, rounded_up] and rounded_up < batch.num_tokens
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    found.sum().backward()
    wanted.sum().backward()
    assert_close(grads(policy), grads(plain))


def test_mutant_a_last_layer_that_reads_elsewhere(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_model()
    plain = Policy(copy.deepcopy(lm), compute_dtype=torch.float32)
    fuse(lm)
    forward = fuse_module._layer_forward
    monkeypatch.setattr(
        fuse_module, "_layer_forward", lambda *args, tuner_at, **rest: forward(*args, tuner_at=tuner_at + 1, **rest)
    )
    batch = pack(pairs())
    assert float((Policy(lm, compute_dtype=torch.float32)(batch) - plain(batch)).detach().abs().max()) > 1e-2


def test_a_window_in_the_config_of_a_llama_means_nothing(make_model: Make) -> None:
    lm = make_model()
    lm.config.sliding_window = 3  # left over from another architecture
    batch = pack(pairs())
    wanted = Policy(copy.deepcopy(lm), compute_dtype=torch.float32, attn_implementation="eager")(batch)
    fuse(lm)
    torch.testing.assert_close(Policy(lm, compute_dtype=torch.float32)(batch), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(wanted, plain_logps(make_model(), pairs()), rtol=0, atol=1e-5)
