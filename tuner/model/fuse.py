"""Modules -> the same modules with a quicker forward, swapped on the instance from one table.

A swap changes the class of one instance to a subclass that overrides `forward`: parameters, state-dict keys and
isinstance checks stay as they were, and peft merges, saves and disables adapters as before. What a fused forward does
not cover (DoRA, several active adapters, merged weights; projections and rotation under autocast, as in full
fine-tuning) runs the original forward. The arithmetic is that of `tuner.kernels`; each swapped module holds the
functions of its run, and each layer whether it keeps what its backward needs or makes part of it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)

from tuner import kernels
from tuner.kernels import Kernels
from tuner.kernels.lora_linear import Adapter
from tuner.model import attention, quantize

Recompute = bool | Literal["selective"]


class _Frozen:
    """A frozen linear as `tuner.kernels.lora_linear` reads it."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def weight(self, dtype: torch.dtype) -> Tensor:
        if quantize.is_4bit(self.base):
            functions: Kernels = self.base.kernels  # type: ignore[assignment]  # fused like what is around it
            return quantize.borrow(self.base, dtype, functions)
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # every module that comes here is a linear
        return weight.detach().to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return None if bias is None else bias.to(dtype)


def _only_adapter(module: lora.layer.LoraLayer) -> str | None:
    """The one plain active adapter of a LoRA linear, or None where the original forward must run."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    plain = name in module.lora_A and name not in module.lora_variant and not module.lora_bias.get(name, False)
    return name if plain else None


def _is_fusible(module: Any) -> bool:
    """Whether `lora_linears` covers what a linear does now."""
    if not isinstance(module, FusedLora):
        return False
    linear: Any = module
    trained = any(p.requires_grad for p in linear.base_layer.parameters())
    return _only_adapter(linear) is not None and not trained


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
    functions: Kernels = modules[0].kernels
    return functions.lora_linears(_compute(x), [_Frozen(m.base_layer) for m in modules], list(map(_adapter, modules)))


def _adapter(module: Any) -> Adapter:
    """The active adapter of a linear that is fusible."""
    name = module.active_adapters[0]
    dropout = module.lora_dropout[name]
    dropped = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], dropped)


def _lora_forward(module: Any, x: Tensor, original: Any, *args: Any, **kwargs: Any) -> Tensor:
    if _is_fusible(module):
        return _together(x, (module,))[0]
    result: Tensor = original(x, *args, **kwargs)
    return result


class FusedLora:
    """A LoRA linear whose adapter is inside the base's autograd node."""


class FusedLoraLinear(FusedLora, lora.Linear):
    """peft's LoRA linear with the adapter inside the base's autograd node."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _lora_forward(self, x, super().forward, *args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with a frozen W that is read (and dequantised) again in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: _Frozen) -> Tensor:
        ctx.base = base
        return F.linear(x, base.weight(x.dtype), base.bias(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.base.weight(grads[0].dtype), None


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    functions: Kernels = module.kernels
    return functions.rms_norm(x, module.weight, module.variance_epsilon)


class FusedLlamaRMSNorm(LlamaRMSNorm):
    """RMSNorm as one autograd node."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm_forward(self, hidden_states)


class FusedMistralRMSNorm(MistralRMSNorm):
    """RMSNorm as one autograd node."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm_forward(self, hidden_states)


def _mlp_forward(module: Any, x: Tensor, wanted: bool) -> Tensor:
    """Not `wanted`, only what the backward keeps is made, where that is all that a recompute is for."""
    functions: Kernels = module.kernels
    gate, up = _linears(x, (module.gate_proj, module.up_proj))
    down = module.down_proj
    if not _is_fusible(down) or torch.is_autocast_enabled(x.device.type):
        return down(functions.swiglu(gate, up))
    return functions.swiglu_lora_linear(gate, up, _Frozen(down.base_layer), _adapter(down), wanted=wanted)


class FusedLlamaMLP(LlamaMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor, *, wanted: bool = True) -> Tensor:
        return _mlp_forward(self, x, wanted)


class FusedMistralMLP(MistralMLP):
    """SwiGLU as one autograd node between its linears."""

    def forward(self, x: Tensor, *, wanted: bool = True) -> Tensor:
        return _mlp_forward(self, x, wanted)


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
    functions: Kernels = module.kernels
    q, k = functions.rope(q, k, cos, sin)
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
        tuner_attention=functions.attention,
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


@contextmanager
def _not_kept(made: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, an autograd node that wants `made` in its backward keeps `again`, which makes it anew."""
    place = made.data_ptr(), made.numel()  # autograd holds on to `pack`, which therefore must not hold the tensor

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        is_made = (kept.data_ptr(), kept.numel()) == place
        return partial(_viewed, again, kept.shape) if is_made else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _viewed(again: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return again().view(shape)


def _made_again(run: Callable[..., Tensor], x: Tensor) -> Tensor:
    """run(x), of which x alone is kept: the backward runs it once more, for what it keeps and not for its result."""
    runs = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return run(x, wanted=runs == 1)

    result: Tensor = checkpoint(counted, x, use_reentrant=False)
    return result


def _layer_forward(layer: Any, x: Tensor, *, tuner_at: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A decoder layer. `tuner_at` names the positions that are read of the last one, whose MLP runs at these alone."""
    at = tuner_at if isinstance(layer, PickingLayer) else None
    if not layer.recompute or not torch.is_grad_enabled():
        return _kept_layer(layer, x, at, **kwargs)
    if layer.recompute == "selective":
        return _selective_layer(layer, x, at, **kwargs)
    return _made_again(partial(_kept_layer, layer, at=at, **kwargs), x)


def _kept_layer(layer: Any, x: Tensor, at: Tensor | None, wanted: bool = True, **kwargs: Any) -> Tensor:
    attended, _ = layer.self_attn(layer.input_layernorm(x), only_at=at, **kwargs)
    normed, x = _second_norm(layer, attended, x if at is None else x.index_select(1, at))
    return x + _mlp(layer.mlp, normed, wanted)


def _selective_layer(layer: Any, x: Tensor, at: Tensor | None, **kwargs: Any) -> Tensor:
    """The same, whose backward makes the norms and the MLP again, but for its last linear; attention is kept."""
    normed = layer.input_layernorm(x)
    with _not_kept(normed, partial(layer.input_layernorm, x.detach())):
        attended, _ = layer.self_attn(normed, only_at=at, **kwargs)
    normed, x = _second_norm(layer, attended, x if at is None else x.index_select(1, at))
    with _not_kept(normed, partial(layer.post_attention_layernorm, x.detach())):
        return x + _made_again(partial(_mlp, layer.mlp), normed)


def _mlp(mlp: nn.Module, x: Tensor, wanted: bool) -> Tensor:
    out: Tensor = mlp(x, wanted=wanted) if isinstance(mlp, FusedLlamaMLP | FusedMistralMLP) else mlp(x)
    return out


def _second_norm(layer: Any, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the MLP reads, the residual stream that goes on)."""
    norm: Any = layer.post_attention_layernorm
    if isinstance(norm, FusedLlamaRMSNorm | FusedMistralRMSNorm):
        functions: Kernels = layer.kernels
        return functions.add_rms_norm(attended, x, norm.weight, norm.variance_epsilon)
    x = x + attended  # peft trains a copy of the norm
    return norm(x), x


class FusedLlamaDecoderLayer(LlamaDecoderLayer):
    """The sum of the residual stream and the norm that reads it as one node."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _layer_forward(self, *args, **kwargs)


class FusedMistralDecoderLayer(MistralDecoderLayer):
    """The sum of the residual stream and the norm that reads it as one node."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _layer_forward(self, *args, **kwargs)


class PickingLayer:
    """A last decoder layer that, told where its output will be read, runs there alone what follows its attention."""


class LastLlamaDecoderLayer(PickingLayer, LlamaDecoderLayer):
    """`tuner_at` `[M]` names the positions that are read; `[1, N, H]` -> `[1, M, H]`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _layer_forward(self, *args, **kwargs)


class LastMistralDecoderLayer(PickingLayer, MistralDecoderLayer):
    """`tuner_at` `[M]` names the positions that are read; `[1, N, H]` -> `[1, M, H]`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _layer_forward(self, *args, **kwargs)


LAST: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LastLlamaDecoderLayer,
    MistralDecoderLayer: LastMistralDecoderLayer,
}
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: FusedLoraLinear,
    LlamaRMSNorm: FusedLlamaRMSNorm,
    MistralRMSNorm: FusedMistralRMSNorm,
    LlamaAttention: FusedLlamaAttention,
    MistralAttention: FusedMistralAttention,
    LlamaMLP: FusedLlamaMLP,
    MistralMLP: FusedMistralMLP,
    LlamaDecoderLayer: FusedLlamaDecoderLayer,
    MistralDecoderLayer: FusedMistralDecoderLayer,
}
_SILU_ONLY = (LlamaMLP, MistralMLP)  # a checkpoint may name another activation

if quantize.Linear4bit is not None:

    class FusedLoraLinear4bit(FusedLora, lora.Linear4bit):
        """The same over a 4-bit base."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _lora_forward(self, x, super().forward, *args, **kwargs)

    class FrozenLinear4bit(quantize.Linear4bit):
        """A 4-bit linear that never repacks its weight, in training or evaluation."""

        def forward(self, x: Tensor) -> Tensor:
            return _FrozenLinear.apply(_compute(x), _Frozen(self))

    FUSED |= {lora.Linear4bit: FusedLoraLinear4bit, quantize.Linear4bit: FrozenLinear4bit}


def fuse(model: nn.Module, functions: Kernels | None = None, *, recompute: Recompute = False) -> Mapping[str, int]:
    """Swaps every module that the table knows, to compute with `functions` (the references unless others are given).

    Returns how many of each class were swapped.

    Args:
        recompute: what decoder layers make again in the backward rather than keep: nothing; "selective", the norms and
            the MLP; or True, everything that follows from their input.
    """
    functions = functions or kernels.load()
    counts: dict[str, int] = {}
    last = {id(m[-1]) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)}
    for module in model.modules():
        fused = (LAST if id(module) in last else FUSED).get(type(module))
        if fused is None or (isinstance(module, _SILU_ONLY) and module.config.hidden_act != "silu"):
            continue
        module.__class__ = fused
        module.kernels = functions  # type: ignore[assignment]  # no submodule, a plain attribute
        if isinstance(module, LlamaDecoderLayer | MistralDecoderLayer):
            module.recompute = recompute  # type: ignore[assignment]
        counts[fused.__name__] = counts.get(fused.__name__, 0) + 1
    return counts
