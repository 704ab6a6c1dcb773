"""Prompts as token ids -> continuations as token ids, by transformers' own `generate` with a KV cache.

Only what is asked for here has an effect: a checkpoint's own generation_config (Llama ships temperature 0.6, top-p 0.9
and sampling) is set aside for the call. The caller decides the mode of the model: no dropout may be active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from tuner.errors import NonFiniteError, RecipeError


class Wrapper(Protocol):
    """A model around a transformers model, as peft's are."""

    def get_base_model(self) -> PreTrainedModel: ...


LanguageModel = PreTrainedModel | Wrapper


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """The new ids of each prompt, in the order of `prompts`; they end with a stop id if the model stopped by itself.

    Args:
        lm: a causal language model of transformers, bare or wrapped by peft, in evaluation mode, with sdpa or eager.
        prompts: token ids, BOS included; none of them empty.
        stop_ids: ids that end an answer. pad_id: fills the left of shorter prompts, where nothing attends to it.
        temperature: 0 takes the likeliest token each time; more samples. top_k, top_p: only with sampling.
        seed: of the samples. The global generators are neither read nor moved.

    Raises:
        RecipeError: a setting out of its range, or a prompt that leaves no room in the model's context.
        NonFiniteError: the logits are NaN.
    """
    base = lm if isinstance(lm, PreTrainedModel) else lm.get_base_model()
    _check(base, prompts, max_new_tokens, temperature, top_k, top_p)
    config = _config(stop_ids, pad_id, max_new_tokens, temperature, top_k, top_p)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that a batch holds little padding
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), _own_rng(base.device, seed), _only(base, config):
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in chosen], pad_id, base.device)
            output = base.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_refuse_nan]),
            )
            for i, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = _until_stop(row, stop_ids)
    return answers


def _check(
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    dropping = [n for n, m in base.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    assert not dropping, f"generate would drop out in {dropping[0]}"
    assert all(prompts), "an empty prompt"
    if max_new_tokens < 1:
        raise RecipeError(f"generate.max_new_tokens: {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise RecipeError(f"generate.temperature: {temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise RecipeError(f"generate.top_k: {top_k} must be at least 1; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise RecipeError(f"generate.top_p: {top_p} must lie above 0 and be at most 1")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise RecipeError("generate.top_k and generate.top_p only act on samples; set generate.temperature above 0")
    context = base.config.max_position_embeddings
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > context:
        raise RecipeError(
            f"a prompt of {longest} tokens and generate.max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context} tokens; shorten the prompt or lower generate.max_new_tokens"
        )


def _config(
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> GenerationConfig:
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "use_cache": True}
    if temperature > 0:  # top_k 0 is "all": unset, transformers would take its own default of 50
        settings |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    ids = {"eos_token_id": list(stop_ids) or None, "pad_token_id": pad_id}
    return GenerationConfig(**ids, **settings)


@contextmanager
def _only(base: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a config leaves unset from the model's own; so for the call they are one and the same."""
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


@contextmanager
def _own_rng(device: torch.device, seed: int) -> Iterator[None]:
    """A fork of the generators of the CPU and of `device` alone, seeded; `torch.manual_seed` would seed all devices."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _refuse_nan(_: Tensor, logits: Tensor) -> Tensor:
    """Broken weights would otherwise answer fluently: the argmax of NaNs is the first token."""
    if logits.isnan().any():
        raise NonFiniteError("the model's logits are NaN, so it can answer nothing; its weights are damaged")
    return logits


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(ids, mask)`, both `[prompts, longest]`; mask is 0 on the padding."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_stop(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Up to and with the first stop id: a row that stopped early is filled with padding after it."""
    end = next((n for n, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]
