"""Held-out prompts -> what the policy answers: how far it went from its reference, how long it speaks, and samples.

The answers that are measured are drawn at temperature 1 from the whole vocabulary, so from the policy itself. Then the
mean of log π(y|x) - log π_ref(y|x) over them estimates KL(π || π_ref) without bias (k1 of J. Schulman, "Approximating
KL Divergence", 2020). His k3, which is never negative, varies less only where the two are close: it has π_ref/π in it,
which is huge for a token that training made rare, and so almost never drawn. A standard error stands beside the mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tuner.data.pack import bins, pack
from tuner.generate import generate
from tuner.losses.measures import mean_and_error
from tuner.model.load import padding_id
from tuner.model.policy import Policy
from tuner.train.loop import ROW_MULTIPLE
from tuner.train.setup import Devices
from tuner.types import Batch, Span, Tokens, span

TOGETHER = 32  # prompts answered at once; fixed, for what is drawn depends on who else is in the batch


@dataclass(frozen=True)
class Prompt:
    """A prompt of a held-out row, and the answer that the row calls good; without tokens if it has none."""

    ids: tuple[int, ...]
    preferred: tuple[int, ...]


def choose_prompts(samples: Sequence[Tokens], count: int, longest: int, seed: int) -> tuple[list[Prompt], int]:
    """`count` different prompts of at most `longest` tokens, or all there are; and how many longer ones were met.

    Their order is drawn with `seed`, and fewer of them are the first of more.
    """
    chosen: dict[tuple[int, ...], Prompt] = {}
    too_long = set()
    for i in np.random.default_rng(seed).permutation(len(samples)).tolist() if count else ():
        ids = _ids(samples[i].trunk)
        if len(ids) > longest:
            too_long.add(ids)
        elif ids not in chosen:
            chosen[ids] = Prompt(ids, _ids(samples[i].branches[0]) if samples[i].labels[0] else ())
        if len(chosen) == count:
            break
    return list(chosen.values()), len(too_long)


def _ids(spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(int(i) for part in spans for i in part.ids)


@dataclass(frozen=True)
class Answers:
    """What a policy answers to held-out prompts, over all ranks."""

    policy: Policy
    reference: Callable[[Batch], Tensor] | None  # None: there is none, or it has left memory
    measured: Sequence[Prompt]
    shown: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    max_new_tokens: int
    capacity: int  # tokens scored at once
    seed: int
    devices: Devices

    def measure(self) -> dict[str, float]:
        """Of one sampled answer to each prompt: mean tokens, the share that stopped by itself, and KL to the reference.

        `kl` is in nats an answer, with its standard error `kl_error`; `kl_per_token` in nats a token.
        """
        if not self.measured:
            return {}
        answers = self._generate(self.measured, temperature=1.0)
        lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.float64)
        stopped = sum(answer[-1] in self.stop_ids for answer in answers) / len(answers)
        values = {"answer_tokens": float(lengths.mean()), "answers_stopped": stopped}
        if self.reference is not None:
            ratios = self._ratios(self.reference, answers)
            values["kl"], error = mean_and_error(ratios)
            values |= {} if error is None else {"kl_error": error}
            values["kl_per_token"] = float(ratios.sum() / lengths.sum())
        return values

    def greedy(self) -> list[str]:
        """The likeliest answer to each of the prompts that are shown."""
        return [self._text(answer) for answer in self._generate(self.shown, temperature=0.0)]

    def beside(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """For each prompt that is shown: what was asked, what is preferred if that is known, and the answers.

        A run that is resumed may show more prompts than it was asked for before it started to train.
        """
        rows = [
            {"asked": self._asked(p)} | ({"preferred": self._text(p.preferred)} if p.preferred else {})
            for p in self.shown
        ]
        for name, answers in (("before", before), ("after", after)):
            for row, answer in zip(rows, answers, strict=False):
                row[name] = answer
        return rows

    def _generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """An answer to each prompt. Ranks share the work by whole batches, so that no answer depends on the ranks."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        batches = [by_length[start : start + TOGETHER] for start in range(0, len(prompts), TOGETHER)]
        mine: dict[int, list[int]] = {}
        with self.policy.generation_mode() as lm:
            for number in range(self.devices.rank, len(batches), self.devices.world_size):
                found = generate(
                    lm,
                    [prompts[i].ids for i in batches[number]],
                    stop_ids=self.stop_ids,
                    pad_id=padding_id(self.tokenizer),
                    max_new_tokens=self.max_new_tokens,
                    temperature=temperature,
                    seed=(self.seed + number) % 2**32,
                    batch_size=TOGETHER,
                )
                mine |= dict(zip(batches[number], found, strict=True))
        everyone = {i: answer for rank in self.devices.gather(mine) for i, answer in rank.items()}
        return [everyone[i] for i in range(len(prompts))]

    def _ratios(self, reference: Callable[[Batch], Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
        """log π(y|x) - log π_ref(y|x) of the answer to each measured prompt, `[A]`."""
        rows = [
            Tokens((span(prompt.ids, False), span(answer, True)))
            for prompt, answer in zip(self.measured, answers, strict=True)
        ]
        mine: dict[int, float] = {}
        was_training = self.policy.training
        self.policy.eval()
        try:
            for ids in bins([len(row) for row in rows], self.capacity)[self.devices.rank :: self.devices.world_size]:
                device = self.devices.device
                batch = pack([rows[i] for i in ids], ROW_MULTIPLE[device.type]).to(device)
                with torch.no_grad():
                    sums = batch.per_sequence(self.policy(batch) - reference(batch))
                mine |= dict(zip(ids, sums.tolist(), strict=True))
        finally:
            self.policy.train(was_training)
        everyone = {i: ratio for rank in self.devices.gather(mine) for i, ratio in rank.items()}
        return torch.tensor([everyone[i] for i in range(len(rows))], dtype=torch.float64)

    def _text(self, ids: Sequence[int]) -> str:
        ended = len(ids) > 0 and ids[-1] in self.stop_ids
        text = self.tokenizer.decode(list(ids[:-1] if ended else ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.strip()

    def _asked(self, prompt: Prompt) -> str:
        """The last turn of a prompt: what stands between its last control tokens, the header of the answer apart."""
        text = self.tokenizer.decode(list(prompt.ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        control = [re.escape(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        parts = [part.strip() for part in re.split("|".join(control), text)] if control else [text]
        return next((part for part in reversed(parts) if part not in ("", "assistant")), text)
