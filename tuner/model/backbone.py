"""Batch -> the last hidden state where a head reads it: what policies and reward models share.

DDP and FSDP hook the forward of what they wrap, so scoring happens inside the forward of a subclass. The backbone is
called directly and the heads are ours; nothing is patched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner import kernels as backends
from tuner.kernels import Kernels
from tuner.kernels.attention import IMPLEMENTATIONS
from tuner.kernels.token_logps.reference import ROW_MULTIPLE
from tuner.model import attention
from tuner.model.fuse import PickingLayer
from tuner.types import Batch


class Backbone(nn.Module):
    """A Llama-family model whose layers run over a `Batch`.

    Args:
        lm: the model, with or without an adapter.
        compute_dtype: dtype of matmuls; parameters stored wider are cast by autocast or by the fused adapters.
        kernels: the functions to compute with, from `tuner.kernels.load`; the references unless others are given.
        attn_implementation: one of `tuner.kernels.attention`, or `sdpa`/`eager` with a dense mask.
    """

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        *,
        compute_dtype: torch.dtype,
        kernels: Kernels | None = None,
        attn_implementation: str = attention.NAME,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.compute_dtype = compute_dtype
        self.attn_implementation = attention.NAME if attn_implementation in IMPLEMENTATIONS else attn_implementation
        self.kernels = kernels or backends.load()
        self.inner.set_attn_implementation(self.attn_implementation)
        self._picks = isinstance(self.inner.model.layers[-1], PickingLayer)
        # Parameters stored wider than the compute dtype are cast at each use. The fused adapters do so themselves, and
        # score heads stay in fp32; what else is wider (full fine-tuning, modules_to_save) goes through autocast.
        casts = [p for name, p in lm.named_parameters() if "lora_" not in name and "score." not in name]
        wider = any(p.dtype != compute_dtype for p in casts if p.is_floating_point())
        self._autocast = wider and compute_dtype != torch.float32

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model without the adapter's wrapper (its linears may still hold adapters)."""
        return self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def autocast(self) -> torch.autocast:
        """Casts what is stored wider than the compute dtype, where anything is."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self._autocast)

    def hidden_states(self, batch: Batch, at: Tensor) -> Tensor:
        """The last hidden state at the positions `at` of the row: `[M]` int64 -> `[M, H]`.

        A fused last layer runs its MLP at these positions alone, for nothing reads what it would give elsewhere.
        """
        count = len(at)
        if at.device.type == "cpu":
            at = F.pad(at, (0, -count % ROW_MULTIPLE))  # sizes had better recur; what is computed twice is not read
        arguments: dict[str, object] = {"use_cache": False}
        if self._picks:
            arguments["tuner_at"] = at
        if self.attn_implementation == attention.NAME:
            arguments |= {"tuner_plan": batch.plan, "tuner_attention": self.kernels.attention}
            # Four dimensions say that the mask is made. Else transformers reads the positions on the host in every
            # pass to find packed rows, which makes a GPU wait, and then asks our mask function for what is no mask.
            arguments["attention_mask"] = batch.doc_ids[None, None, None]
        else:
            arguments["attention_mask"] = self._mask(batch)
        with self.autocast():
            output = self.inner.model(
                input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], **arguments
            )
        states = output.last_hidden_state[0]
        return (states if self._picks else states.index_select(0, at))[:count]

    def _mask(self, batch: Batch) -> Tensor:
        config = self.inner.config
        seen = attention.dense_mask(batch, config.sliding_window if config.model_type == "mistral" else None)
        if self.attn_implementation == "sdpa":
            return seen
        dtype = self.compute_dtype  # eager adds its mask
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def head_weight(head: nn.Module) -> Tensor:
    """`[outputs, H]`: the weight of a linear head; where peft trains a copy of it, of that copy while it is on."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
    weight: Tensor = head.weight  # type: ignore[assignment]  # a head is a linear
    return weight
