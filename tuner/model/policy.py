"""Batch -> log-probabilities: a causal language model that scores only the positions it is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tuner.model.backbone import Backbone, head_weight
from tuner.types import Batch


class Policy(Backbone):
    """A Llama-family model that turns a `Batch` into one log-probability per prediction."""

    def head_weight(self) -> Tensor:
        """`[V, H]`: the weight that turns states into logits, including whatever trains on it."""
        return head_weight(self.inner.get_output_embeddings())

    def forward(self, batch: Batch, *, measures: Sequence[str] = ()) -> Tensor:
        """Log-probability of each target of the batch, natural logarithms.

        Args:
            measures: what else is wanted of each prediction: `collision`, `entropy`, `top1` (kernels/token_logps).

        Returns:
            `[M]` float32; with measures `[1 + measures, M]`, of which only the first row has a gradient.
        """
        picked = self.hidden_states(batch, batch.predict_at).to(self.compute_dtype)
        return self.kernels.token_logps(picked, self.head_weight(), batch.targets, measures=measures)

    @contextmanager
    def generation_mode(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as `generate` needs it: plain sdpa, evaluation mode, no gradient; everything is put back after."""
        was_training = self.training
        self.eval()
        self.inner.set_attn_implementation("sdpa")
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad(), self.autocast():
                yield self.lm
        finally:
            self.inner.set_attn_implementation(self.attn_implementation)
            self.train(was_training)
