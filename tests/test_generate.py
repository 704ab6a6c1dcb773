"""Generation: what is asked for, nothing from the checkpoint, independent of batching, no global generator moved."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tuner import generate as module
from tuner.errors import NonFiniteError, RecipeError
from tuner.generate import generate

# peft 0.21 asks transformers 5.23 under an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

VOCAB, PAD, STOP = 320, 3, 7
PROMPTS = [[1, 20, 30, 40], [1, 50], [1, *range(60, 90)], [1, 99, 98], [1, 44, 45, 46, 47, 48, 49]]


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # sharp enough for no near ties
    )
    return LlamaForCausalLM(config).eval()


def run(lm: Any, prompts: Any = PROMPTS, **changes: Any) -> list[list[int]]:
    return generate(lm, prompts, **({"stop_ids": [STOP], "pad_id": PAD, "max_new_tokens": 12} | changes))


def plain_greedy(lm: Any, prompt: list[int], stop_ids: list[int], count: int) -> list[int]:
    """One prompt, no cache, no padding, argmax."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and not (new and new[-1] in stop_ids):
            new.append(int(lm(input_ids=torch.tensor([prompt + new])).logits[0, -1].argmax()))
    return new


def test_greedy_equals_one_prompt_at_a_time_without_cache(lm: LlamaForCausalLM) -> None:
    expected = [plain_greedy(lm, p, [STOP], 12) for p in PROMPTS]
    for batch_size in (1, 2, 3, 64):
        assert run(lm, batch_size=batch_size) == expected


def test_mutant_padding_that_is_attended_to(lm: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = module._left_padded
    monkeypatch.setattr(module, "_left_padded", lambda *a: (padded(*a)[0], torch.ones_like(padded(*a)[1])))
    with pytest.raises(AssertionError):
        test_greedy_equals_one_prompt_at_a_time_without_cache(lm)


def test_an_answer_ends_with_its_stop_id(lm: LlamaForCausalLM) -> None:
    free = run(lm, stop_ids=[])
    assert all(len(ids) == 12 for ids in free)
    stop = free[0][4]
    stopped = run(lm, stop_ids=[stop, 5])
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert stopped == [plain_greedy(lm, p, [stop, 5], 12) for p in PROMPTS]
    assert run(lm, stop_ids=[stop], pad_id=stop) == run(lm, stop_ids=[stop])  # a pad that is the terminator


def test_nothing_leaks_from_the_checkpoint(lm: LlamaForCausalLM) -> None:
    expected = run(lm)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=9.0,
        eos_token_id=expected[0][1],
        min_new_tokens=3,
        suppress_tokens=[expected[1][0]],
        max_length=5,
    )
    sampled = run(lm, temperature=1.0, seed=3)
    before = lm.generation_config
    lm.generation_config = own
    try:
        assert run(lm) == expected
        assert run(lm, temperature=1.0, seed=3) == sampled
        assert lm.generation_config is own
    finally:
        lm.generation_config = before


def test_mutant_the_checkpoints_config_stays(lm: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_only", lambda base, config: torch.no_grad())
    with pytest.raises(AssertionError):
        test_nothing_leaks_from_the_checkpoint(lm)


def test_sampling_is_seeded_and_moves_no_global_generator(lm: LlamaForCausalLM) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = state()
    first = run(lm, temperature=1.0, seed=1)
    assert state() == before
    torch.manual_seed(99)
    assert run(lm, temperature=1.0, seed=1) == first
    assert run(lm, temperature=1.0, seed=2) != first
    assert run(lm) != first


def test_top_k_top_p_and_temperature_narrow_the_choice(lm: LlamaForCausalLM) -> None:
    greedy = run(lm)
    assert run(lm, temperature=1.0, top_k=1) == greedy
    assert run(lm, temperature=1.0, top_p=1e-6) == greedy
    assert run(lm, temperature=1e-4) == greedy
    # without top_k all tokens can come, not the 50 that transformers would take by default
    with torch.no_grad():
        rank = lm(input_ids=torch.tensor([[1, 50]])).logits[0, -1].argsort(descending=True).argsort()
    drawn = run(lm, [[1, 50]] * 400, temperature=5.0, max_new_tokens=1)
    assert max(int(rank[ids[0]]) for ids in drawn) >= 50
    drawn = run(lm, [[1, 50]] * 400, temperature=5.0, max_new_tokens=1, top_k=4)
    assert {int(rank[ids[0]]) for ids in drawn} == {0, 1, 2, 3}


def test_through_an_adapter(lm: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    base = LlamaForCausalLM(lm.config)
    base.load_state_dict(lm.state_dict())
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted = run(model)
    assert adapted == [plain_greedy(model, p, [STOP], 12) for p in PROMPTS]
    assert adapted != run(lm)


def test_active_dropout_is_a_mistake_of_the_caller(lm: LlamaForCausalLM) -> None:
    base = LlamaForCausalLM(lm.config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)).train()
    with pytest.raises(AssertionError, match="drop out"):
        run(model)
    run(model.eval())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0"),
        ({"top_k": 5}, "only act on samples"),
        ({"max_new_tokens": 98}, "a prompt of 31 tokens .* context of 128"),
    ],
)
def test_settings_out_of_range(lm: LlamaForCausalLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(lm, **changes)


def test_no_prompts_no_answers(lm: LlamaForCausalLM) -> None:
    assert run(lm, []) == []


def test_broken_weights_answer_nothing() -> None:
    """The argmax of NaNs is token 0: without a check the answers look like text."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    broken = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        run(broken)
