"""Modules -> the same modules with a quicker forward, swapped on the instance from one table.

A swap changes the class of one instance to a subclass that overrides `forward`: parameters, state-dict keys and
isinstance checks stay as they were, and peft merges, saves and disables adapters as before. What a fused forward does
not cover (DoRA, several active adapters, merged weights) runs the original forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)

from tuner.model import attention, quantize


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` of a frozen linear in `dtype`; 4-bit weights are dequantised anew each time."""
    if quantize.is_4bit(base):
        return quantize.dequantize(base, dtype)
    weight: Tensor = base.weight  # type: ignore[assignment]  # every module that comes here is a linear
    return weight.detach().to(dtype)


def _bias(base: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return None if bias is None else bias.to(dtype)


class _LoraLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + (x (s_i A_i)^T) B_i^T of several linears on one x, as one node: fp32 masters A and B, cast
    to the dtype of x once.

    LoRA, arXiv:2106.09685 section 4.1. The A of all lie in one matrix, so x is read once for them, and the gradients to
    x are added up inside of the matmuls. The backward keeps x and x(sA)^T, reads W again (dequantising it again if it
    is 4-bit), and gives fp32 gradients of A and B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[nn.Module], scalings: Sequence[float], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        ranks = [a.shape[0] for a in adapters[::2]]
        a16 = torch.cat([a * s for a, s in zip(adapters[::2], scalings, strict=True)]).to(x.dtype)  # [R, in], R = sum r
        b16 = [b.to(x.dtype) for b in adapters[1::2]]
        xa = flat @ a16.T  # [N, R]
        outputs = []
        for base, own, b in zip(bases, xa.split(ranks, dim=1), b16, strict=True):
            y = F.linear(flat, _frozen_weight(base, x.dtype), _bias(base, x.dtype))
            outputs.append(y.addmm_(own, b.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, xa, a16, *b16)
        ctx.bases, ctx.scalings, ctx.ranks, ctx.shape = bases, scalings, ranks, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, xa, a16, *b16 = ctx.saved_tensors
        gs = [g.reshape(flat.shape[0], -1) for g in grads]
        gb = torch.cat([g @ b for g, b in zip(gs, b16, strict=True)], dim=1)  # [N, R]
        grads_b = [(g.T @ own).float() for g, own in zip(gs, xa.split(ctx.ranks, dim=1), strict=True)]
        grads_a = (gb.T @ flat).float().split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gb @ a16
            for g, base in zip(gs, ctx.bases, strict=True):
                grad_x.addmm_(g, _frozen_weight(base, g.dtype))
            grad_x = grad_x.view(ctx.shape)
        scaled = [a * s for a, s in zip(grads_a, ctx.scalings, strict=True)]
        return grad_x, None, None, *(grad for pair in zip(scaled, grads_b, strict=True) for grad in pair)


def _only_adapter(module: lora.layer.LoraLayer) -> str | None:
    """The one plain active adapter of a LoRA linear, or None where the original forward must run."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    plain = name in module.lora_A and name not in module.lora_variant and not module.lora_bias.get(name, False)
    return name if plain else None


def _dropout(module: Any, name: str) -> nn.Module | None:
    """The dropout of an adapter where it is at work."""
    dropout = module.lora_dropout[name]
    return dropout if module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0 else None


def _is_fusible(module: nn.Module) -> bool:
    """Whether `_LoraLinears` covers what a linear does now."""
    if not isinstance(module, FusedLoraLinear | FusedLoraLinear4bit):
        return False
    name = _only_adapter(module)
    trained = any(p.requires_grad for p in module.base_layer.parameters())
    return name is not None and not trained and _dropout(module, name) is None


def _compute(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast asks for."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def _linears(x: Tensor, modules: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs of linears that share one input."""
    if all(map(_is_fusible, modules)):
        return _together(x, modules)
    return tuple(module(x) for module in modules)


def _together(x: Tensor, modules: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same by one node, of linears that are fusible."""
    named = [(module, module.active_adapters[0]) for module in modules]
    adapters = [linear[name].weight for m, name in named for linear in (m.lora_A, m.lora_B)]
    scalings = [m.scaling[name] for m, name in named]
    return _LoraLinears.apply(_compute(x), [m.base_layer for m in modules], scalings, *adapters)


def _lora_forward(module: Any, x: Tensor, original: Any, *args: Any, **kwargs: Any) -> Tensor:
    if _is_fusible(module):
        return _together(x, (module,))[0]
    name = _only_adapter(module)
    if name is None or any(p.requires_grad for p in module.base_layer.parameters()):
        return original(x, *args, **kwargs)
    x = _compute(x)
    a, b, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    # dropout sits between x and A only, so the adapter's x is not the base's x
    delta = F.linear(F.linear(module.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype)) * scaling
    return _FrozenLinear.apply(x, module.base_layer) + delta


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
        return _FrozenLinear.apply(_compute(x), self)


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
    return module.down_proj(_SwiGLU.apply(*_linears(x, (module.gate_proj, module.up_proj))))


class FusedLlamaMLP(LlamaMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor) -> Tensor:
        return _mlp_forward(self, x)


class FusedMistralMLP(MistralMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor) -> Tensor:
        return _mlp_forward(self, x)


class _Rope(torch.autograd.Function):
    """x rotated by the angles of its positions (RoPE, arXiv:2104.09864 eq. 34), half against half as Llama lays it out.

    `x` `[1, N, heads, D]`; `cos`, `sin` `[1, N, D]`, equal in both halves of D. The backward turns the other way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos[:, :, None, :half], sin[:, :, None, :half])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        return _rotated(grads[0], cos[:, :, None, :half], -sin[:, :, None, :half]), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (left, right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


def _attention_forward(
    module: Any,
    original: Any,
    hidden_states: Tensor,
    *,
    window: int | None = None,
    only_at: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention by the plan of a row, with one node for the three projections and one for each rotation.

    `[1, N, H]` -> `[1, N, H]`, or at the positions `only_at` alone.
    """
    x = hidden_states
    if module.config._attn_implementation != attention.NAME or torch.is_autocast_enabled(x.device.type):
        output, weights = original(x, **kwargs)
        return output if only_at is None else output.index_select(1, only_at), weights
    heads = (*x.shape[:-1], -1, module.head_dim)
    cos, sin = kwargs["position_embeddings"]
    q, k, v = (y.view(heads) for y in _linears(x, (module.q_proj, module.k_proj, module.v_proj)))
    q, k = (_Rope.apply(y, cos, sin) for y in (q, k))
    output, _ = attention.tuner_varlen(
        module,
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        kwargs.get("attention_mask"),
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=window,
        tuner_plan=kwargs.get("tuner_plan"),
    )
    output = output.flatten(2)
    return module.o_proj(output if only_at is None else output.index_select(1, only_at)), None


class FusedLlamaAttention(LlamaAttention):
    """Attention by the plan of a row, with one node for its projections."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return _attention_forward(self, super().forward, *args, **kwargs)


class FusedMistralAttention(MistralAttention):
    """Attention by the plan of a row, with one node for its projections, and the window of the model."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return _attention_forward(self, super().forward, *args, window=self.config.sliding_window, **kwargs)


class PickingLayer:
    """A last decoder layer that, told where its output will be read, runs there alone what follows its attention."""


def _picking_forward(layer: Any, original: Any, x: Tensor, *, at: Tensor | None, **kwargs: Any) -> Tensor:
    if at is None:
        return original(x, **kwargs)
    attended, _ = layer.self_attn(layer.input_layernorm(x), only_at=at, **kwargs)
    x = x.index_select(1, at) + attended
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
    LlamaAttention: FusedLlamaAttention,
    MistralAttention: FusedMistralAttention,
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
