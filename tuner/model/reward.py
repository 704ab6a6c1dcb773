"""Batch -> rewards: a sequence-classification model that is read where each answer ends."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tuner.model.backbone import Backbone, head_weight
from tuner.types import Batch


class RewardModel(Backbone):
    """A Llama-family model with one label that turns a `Batch` into one reward per scored sequence."""

    def head_weight(self) -> Tensor:
        """`[1, H]`: the weight that turns a state into a reward."""
        return head_weight(self.inner.get_submodule("score"))

    def forward(self, batch: Batch) -> Tensor:
        """Reward of each scored sequence, read from the state of its last token.

        Returns:
            `[S]` float32.
        """
        ends = self.hidden_states(batch, batch.seq_end)
        return F.linear(ends.float(), self.head_weight().float())[:, 0]  # in bf16 few rewards would be distinct
