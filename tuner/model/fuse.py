"""Modules -> the same modules with a quicker forward, swapped on the instance from one table.

A swap changes the class of one instance to a subclass that overrides `forward`: parameters, state-dict keys and
isinstance checks stay as they were, and peft merges, saves and disables adapters as before. What a fused forward does
not cover (DoRA, several active adapters, merged weights) runs the original forward.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP, MistralRMSNorm

from tuner.model import quantize


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` of a frozen linear in `dtype`; 4-bit weights are dequantised anew each time."""
    if quantize.is_4bit(base):
        return quantize.dequantize(base, dtype)
    weight: Tensor = base.weight  # type: ignore[assignment]  # every module that comes here is a linear
    return weight.detach().to(dtype)


def _bias(base: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return None if bias is None else bias.to(dtype)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + (x (sA)^T) B^T as one node: fp32 masters A and B, cast to the dtype of x once.

    LoRA, arXiv:2106.09685 section 4.1. The backward keeps x and x(sA)^T, reads W again (dequantising it again if it is
    4-bit), and gives fp32 gradients of A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a16, b16 = (a * scaling).to(x.dtype), b.to(x.dtype)
        xa = flat @ a16.T  # [N, r]
        y = F.linear(flat, _frozen_weight(base, x.dtype), _bias(base, x.dtype))
        y.addmm_(xa, b16.T)
        ctx.save_for_backward(flat, xa, a16, b16)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, xa, a16, b16 = ctx.saved_tensors
        g = grads[0].reshape(flat.shape[0], -1)
        gb = g @ b16  # [N, r]
        grad_b = (g.T @ xa).float()
        grad_a = (gb.T @ flat).float().mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ _frozen_weight(ctx.base, g.dtype)).addmm_(gb, a16).view(ctx.shape)
        return grad_x, None, grad_a, grad_b, None


def _only_adapter(module: lora.layer.LoraLayer) -> str | None:
    """The one plain active adapter of a LoRA linear, or None where the original forward must run."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    plain = name in module.lora_A and name not in module.lora_variant and not module.lora_bias.get(name, False)
    return name if plain else None


def _lora_forward(module: Any, x: Tensor, original: Any, *args: Any, **kwargs: Any) -> Tensor:
    name = _only_adapter(module)
    if name is None or module.base_layer.weight.requires_grad:
        return original(x, *args, **kwargs)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    a, b, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    dropout = module.lora_dropout[name]
    if module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        # dropout sits between x and A only, so the adapter's x is not the base's x
        delta = F.linear(F.linear(dropout(x), a.to(x.dtype)), b.to(x.dtype)) * scaling
        return _FrozenLinear.apply(x, module.base_layer) + delta
    return _LoraLinear.apply(x, module.base_layer, a, b, scaling)


class FusedLoraLinear(lora.Linear):
    """peft's LoRA linear with the adapter inside the base's autograd node."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _lora_forward(self, x, super().forward, *args, **kwargs)


class FusedLoraLinear4bit(lora.Linear4bit):
    """The same over a 4-bit base."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _lora_forward(self, x, super().forward, *args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with a frozen W that is read (and dequantised) again in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module) -> Tensor:
        ctx.base = base
        return F.linear(x, _frozen_weight(base, x.dtype), _bias(base, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ _frozen_weight(ctx.base, grads[0].dtype), None


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear that never repacks its weight, in training or evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenLinear.apply(x, self)


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), rms(x) = sqrt(mean(x^2) + eps), in fp32 inside (arXiv:1910.07467 eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (x32 * rstd).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        g = grads[0].float()
        normed = x.float() * rstd  # not in place: in fp32 x.float() is x
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        gw = g * weight
        mean = (gw * normed).mean(-1, keepdim=True)
        return gw.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype), grad_weight, None


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


class FusedLlamaRMSNorm(LlamaRMSNorm):
    """RMSNorm as one autograd node."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm_forward(self, hidden_states)


class FusedMistralRMSNorm(MistralRMSNorm):
    """RMSNorm as one autograd node."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm_forward(self, hidden_states)


class _SwiGLU(torch.autograd.Function):
    """h = silu(g) * u (arXiv:2002.05202 eq. 6); keeps g and u, makes silu again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        g = grads[0]
        grad_up = F.silu(gate).mul_(g)
        grad_gate = torch.ops.aten.silu_backward(g * up, gate)
        return grad_gate, grad_up


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


class FusedLlamaMLP(LlamaMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor) -> Tensor:
        return _mlp_forward(self, x)


class FusedMistralMLP(MistralMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor) -> Tensor:
        return _mlp_forward(self, x)


class PickingLayer:
    """A last decoder layer that, told where its output will be read, runs its MLP there alone."""


def _picking_forward(layer: Any, original: Any, x: Tensor, *, at: Tensor | None, **kwargs: Any) -> Tensor:
    if at is None:
        return original(x, **kwargs)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
    x = x.index_select(1, at) + attended.index_select(1, at)
    return x + layer.mlp(layer.post_attention_layernorm(x))


class LastLlamaDecoderLayer(PickingLayer, LlamaDecoderLayer):
    """`tuner_at` `[M]` names the positions that are read; `[1, N, H]` -> `[1, M, H]`."""

    def forward(self, *args: Any, tuner_at: Tensor | None = None, **kwargs: Any) -> Tensor:
        return _picking_forward(self, super().forward, *args, at=tuner_at, **kwargs)


class LastMistralDecoderLayer(PickingLayer, MistralDecoderLayer):
    """`tuner_at` `[M]` names the positions that are read; `[1, N, H]` -> `[1, M, H]`."""

    def forward(self, *args: Any, tuner_at: Tensor | None = None, **kwargs: Any) -> Tensor:
        return _picking_forward(self, super().forward, *args, at=tuner_at, **kwargs)


LAST: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LastLlamaDecoderLayer,
    MistralDecoderLayer: LastMistralDecoderLayer,
}
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: FusedLoraLinear,
    lora.Linear4bit: FusedLoraLinear4bit,
    bnb.nn.Linear4bit: FrozenLinear4bit,
    LlamaRMSNorm: FusedLlamaRMSNorm,
    MistralRMSNorm: FusedMistralRMSNorm,
    LlamaMLP: FusedLlamaMLP,
    MistralMLP: FusedMistralMLP,
}
_SILU_ONLY = (LlamaMLP, MistralMLP)  # a checkpoint may name another activation


def fuse(model: nn.Module) -> dict[str, int]:
    """Swaps every module that the table knows; returns how many of each class were swapped."""
    counts: dict[str, int] = {}
    last = {id(m[-1]) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)}
    for module in model.modules():
        fused = (LAST if id(module) in last else FUSED).get(type(module))
        if fused is None or (isinstance(module, _SILU_ONLY) and module.config.hidden_act != "silu"):
            continue
        module.__class__ = fused
        counts[fused.__name__] = counts.get(fused.__name__, 0) + 1
    return counts
