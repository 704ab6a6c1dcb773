"""Batch -> log-probabilities: a causal language model that scores only the positions it is asked about.

DDP and FSDP hook the forward of what they wrap, so scoring happens inside this forward. The backbone is called
directly and the head is ours; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.kernels import BACKENDS
from tuner.model import attention
from tuner.types import Batch


class Policy(nn.Module):
    """A Llama-family model that turns a `Batch` into one log-probability per prediction.

    Args:
        lm: the model, with or without an adapter.
        compute_dtype: dtype of matmuls; parameters stored wider are cast by autocast or by the fused adapters.
        kernels: the backend of the ops, from `tuner.kernels.resolve_backend`.
        attn_implementation: `tuner_varlen`, or `sdpa`/`eager` with a dense mask.
    """

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        *,
        compute_dtype: torch.dtype,
        kernels: str = "reference",
        attn_implementation: str = attention.NAME,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.compute_dtype = compute_dtype
        self.attn_implementation = attn_implementation
        self._token_logps = BACKENDS[kernels]["token_logps"]
        self.causal_lm.set_attn_implementation(attn_implementation)
        # Parameters stored wider than the compute dtype are cast at each use. The fused adapters do so themselves; what
        # else is wider (full fine-tuning, modules_to_save) goes through autocast.
        fused = {id(p) for name, p in lm.named_parameters() if "lora_" in name}
        wider = any(p.dtype != compute_dtype and id(p) not in fused for p in lm.parameters() if p.is_floating_point())
        self._autocast = wider and compute_dtype != torch.float32

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model without the adapter's wrapper (its linears may still hold adapters)."""
        return self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def head_weight(self) -> Tensor:
        """`[V, H]`: the weight that turns states into logits, including whatever trains on it."""
        head = self.causal_lm.get_output_embeddings()
        if isinstance(head, ModulesToSaveWrapper):
            head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
        return head.weight

    def forward(self, batch: Batch, *, collision: bool = False) -> Tensor:
        """Log-probability of each target of the batch, natural logarithms.

        Returns:
            `[M]` float32; with `collision` `[2, M]`, the second row log Σ_v p(v)² of each prediction, without gradient.
        """
        with torch.autocast(batch.input_ids.device.type, self.compute_dtype, enabled=self._autocast):
            hidden = self.hidden_states(batch)
        picked = hidden.index_select(0, batch.predict_at).to(self.compute_dtype)
        return self._token_logps(picked, self.head_weight(), batch.targets, collision=collision)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden state at every position of the row, `[N, H]`."""
        backbone = self.causal_lm.model
        arguments: dict[str, object] = {"use_cache": False}
        if self.attn_implementation == attention.NAME:
            arguments["tuner_plan"] = batch.plan
        else:
            arguments["attention_mask"] = self._mask(batch)
        output = backbone(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], **arguments)
        return output.last_hidden_state[0]

    def _mask(self, batch: Batch) -> Tensor:
        seen = attention.dense_mask(batch, self.causal_lm.config.to_dict().get("sliding_window"))
        if self.attn_implementation == "sdpa":
            return seen
        dtype = self.compute_dtype  # eager adds its mask
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    @contextmanager
    def generation_mode(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as `generate` needs it: plain sdpa, evaluation mode, no gradient; everything is put back after."""
        was_training = self.training
        self.eval()
        self.causal_lm.set_attn_implementation("sdpa")
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices=devices),
                torch.no_grad(),
                torch.autocast(self.device.type, self.compute_dtype, enabled=self._autocast),
            ):
                yield self.lm
        finally:
            self.causal_lm.set_attn_implementation(self.attn_implementation)
            self.train(was_training)
