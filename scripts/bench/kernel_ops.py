"""The operations that `ops.py` times: inputs of a Llama's shapes, and every way at hand to compute the same.

`reference` and `triton` are ours; `eager` is what transformers or peft run, `compile` the same through torch.compile;
`torch-...` are torch's own fused operations; `liger` and `bitsandbytes` stand where they are installed. `exact` is the
formula in plain torch, which is run in float64 to say how far off the others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import synthetic
import torch
import torch.nn.functional as F
from floor import pairs_seen
from models import Shape
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tuner import kernels
from tuner.data.pack import pack
from tuner.kernels import attention as attentions
from tuner.kernels.lora_linear import Adapter
from tuner.model.attention import dense_mask

EPS = 1e-5
NF4 = (
    -1.0,
    -0.6961928,
    -0.5250731,
    -0.3949175,
    -0.2844414,
    -0.1847734,
    -0.0910500,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.3379152,
    0.4407098,
    0.5626170,
    0.7229568,
    1.0,
)  # fmt: skip  QLoRA, arXiv:2305.14314 appendix E
Compute = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """One operation at one size: inputs, the ways to compute it, and the work that it cannot do without."""

    name: str
    inputs: tuple[Tensor, ...]
    sides: dict[str, Compute]
    exact: Compute
    flops: float = 0.0  # forward and backward; of what is bound by arithmetic
    moved_bytes: float = 0.0  # the same; of what is bound by memory
    backward: bool = True
    about: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Maker:
    """Makes inputs: on a device, in a dtype, for the shapes of a Llama and a number of tokens."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    tokens: int

    def normal(self, *size: int, grad: bool = True, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        made = torch.randn(size, device=self.device) * scale
        return made.to(dtype or self.dtype).requires_grad_(grad)

    def ours(self) -> dict[str, kernels.Kernels]:
        """Our backends that run here."""
        found = {"reference": kernels.load("reference")}
        if kernels.why_no_triton(self.device) is None and not kernels.INTERPRETED:
            found["triton"] = kernels.load("triton", attentions.REFERENCE)
        return found


def one(fn: Callable[..., Tensor]) -> Compute:
    return lambda *inputs: (fn(*inputs),)


# --- norms, rotation, activation ---


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _hf_norm(hidden: int) -> Callable[[Tensor, Tensor], Tensor]:
    module = LlamaRMSNorm(hidden, EPS)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    return norm


def rms_norm(make: Maker) -> Op:
    """y = w x / rms(x)."""
    hidden = make.shape.hidden
    inputs = (make.normal(make.tokens, hidden), make.normal(hidden, grad=False))
    sides = {name: one(lambda x, w, f=ours.rms_norm: f(x, w, EPS)) for name, ours in make.ours().items()}
    sides["eager"] = one(_hf_norm(hidden))
    sides["torch-rms_norm"] = one(lambda x, w: F.rms_norm(x, (hidden,), w, EPS))
    if find_spec("liger_kernel") and make.device.type == "cuda":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        sides["liger"] = one(lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False))
    size = make.tokens * hidden * inputs[0].element_size()
    return Op("rms_norm", inputs, sides, one(_exact_norm), moved_bytes=5 * size)


def add_rms_norm(make: Maker) -> Op:
    """The sum of the residual stream, and its norm."""
    hidden = make.shape.hidden
    inputs = (make.normal(make.tokens, hidden), make.normal(make.tokens, hidden), make.normal(hidden, grad=False))
    norm = _hf_norm(hidden)
    sides: dict[str, Compute] = {
        name: lambda x, r, w, f=ours.add_rms_norm: f(x, r, w, EPS) for name, ours in make.ours().items()
    }
    sides["eager"] = lambda x, r, w: (norm(x + r, w), x + r)
    sides["torch-rms_norm"] = lambda x, r, w: (F.rms_norm(total := x + r, (hidden,), w, EPS), total)
    size = make.tokens * hidden * inputs[0].element_size()
    return Op("add_rms_norm", inputs, sides, lambda x, r, w: (_exact_norm(x + r, w), x + r), moved_bytes=8 * size)


def rope(make: Maker) -> Op:
    """Queries and keys, rotated by their positions."""
    shape, dim = make.shape, make.shape.head_dim
    inverse = 500_000.0 ** (-torch.arange(0, dim, 2, device=make.device).float() / dim)
    angles = torch.arange(make.tokens, device=make.device).float()[:, None] * inverse
    table = torch.cat([angles, angles], -1)[None]
    q, k = (make.normal(1, make.tokens, heads, dim) for heads in (shape.heads, shape.kv_heads))
    inputs = (q, k, table.cos().to(make.dtype), table.sin().to(make.dtype))
    sides: dict[str, Compute] = {name: ours.rope for name, ours in make.ours().items()}
    sides["eager"] = lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    size = (q.numel() + k.numel()) * q.element_size()
    return Op("rope", inputs, sides, sides["eager"], moved_bytes=4 * size)


def swiglu(make: Maker) -> Op:
    """silu(gate) * up."""
    inputs = (make.normal(make.tokens, make.shape.intermediate), make.normal(make.tokens, make.shape.intermediate))
    sides = {name: one(ours.swiglu) for name, ours in make.ours().items()}
    sides["eager"] = one(lambda gate, up: F.silu(gate) * up)
    if find_spec("liger_kernel") and make.device.type == "cuda":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        sides["liger"] = one(LigerSiLUMulFunction.apply)
    return Op("swiglu", inputs, sides, sides["eager"], moved_bytes=8 * inputs[0].numel() * inputs[0].element_size())


# --- head ---


def token_logps(make: Maker) -> Op:
    """Minus the summed log-probs of targets under a frozen head: what SFT minimises."""
    shape = make.shape
    targets = torch.randint(shape.vocab, (make.tokens,), device=make.device)
    scale = shape.hidden**-0.5
    inputs = (
        make.normal(make.tokens, shape.hidden),
        make.normal(shape.vocab, shape.hidden, grad=False, scale=scale),
        targets,
    )

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    sides = {name: one(lambda h, w, t, f=ours.token_logps: -f(h, w, t).sum()) for name, ours in make.ours().items()}
    sides["eager"] = one(eager)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        sides["torch-linear_cross_entropy"] = one(
            lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
        )
    if find_spec("liger_kernel") and make.device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        sides["liger"] = one(lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, reduction="sum"))
    flops = 4.0 * make.tokens * shape.hidden * shape.vocab
    return Op("token_logps", inputs, sides, one(exact), flops=flops)


# --- linears ---


@dataclass(frozen=True)
class Frozen:
    """A frozen linear without bias, as our LoRA reads it."""

    kept: Tensor

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.kept.to(dtype)

    def bias(self, _: torch.dtype) -> Tensor | None:
        return None


def _peft_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A LoRA linear as peft runs it: the adapter in its own, wider dtype."""
    y = F.linear(x, w)
    return (y + F.linear(F.linear(x.to(a.dtype), a), b) * 2.0).to(y.dtype)


def lora_linears(make: Maker) -> Op:
    """The three projections of attention on one input, each with an adapter: x, then W, A, B of each."""
    shape = make.shape
    sizes = [size for name, size in shape.linears().items() if name in ("q_proj", "k_proj", "v_proj")]
    x, scale = make.normal(make.tokens, shape.hidden), shape.hidden**-0.5
    inputs: list[Tensor] = [x]
    for out, inner in sizes:
        inputs += [make.normal(out, inner, grad=False, scale=scale), *_adapter(make, out, inner)]

    def ours(functions: kernels.Kernels) -> Compute:
        def compute(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            groups = _by_three(rest)
            bases = [Frozen(w) for w, _, _ in groups]
            return functions.lora_linears(x, bases, [Adapter(a, b, 2.0) for _, a, b in groups])

        return compute

    def eager(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(_peft_linear(x, *group) for group in _by_three(rest))

    sides: dict[str, Compute] = {name: ours(functions) for name, functions in make.ours().items()}
    sides["eager"] = eager
    flops = 4.0 * make.tokens * sum(out * inner for out, inner in sizes)
    return Op("lora_linears", tuple(inputs), sides, eager, flops=flops)


def swiglu_lora_linear(make: Maker) -> Op:
    """The last linear of an MLP with its activation and its adapter."""
    out, inner = make.shape.linears()["down_proj"]
    gate, up = make.normal(make.tokens, inner), make.normal(make.tokens, inner)
    inputs = (gate, up, make.normal(out, inner, grad=False, scale=inner**-0.5), *_adapter(make, out, inner))

    def ours(functions: kernels.Kernels) -> Compute:
        return one(lambda g, u, w, a, b: functions.swiglu_lora_linear(g, u, Frozen(w), Adapter(a, b, 2.0)))

    eager = one(lambda g, u, w, a, b: _peft_linear(F.silu(g) * u, w, a, b))
    sides = {name: ours(functions) for name, functions in make.ours().items()} | {"eager": eager}
    return Op("swiglu_lora_linear", inputs, sides, eager, flops=4.0 * make.tokens * out * inner)


def _adapter(make: Maker, out: int, inner: int) -> tuple[Tensor, Tensor]:
    rank = synthetic.RANK
    wide = torch.float32
    return make.normal(rank, inner, dtype=wide, scale=inner**-0.5), make.normal(out, rank, dtype=wide, scale=0.1)


def _by_three(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def dequantize_nf4(make: Maker) -> Op:
    """The 4-bit weight of an MLP's linear, 64 weights a scale."""
    shape = make.shape.linears()["gate_proj"]
    count = shape[0] * shape[1]
    packed = torch.randint(256, (count // 2,), dtype=torch.uint8, device=make.device)
    scales = torch.rand(count // 64, device=make.device)
    code = torch.tensor(NF4, device=make.device)

    def ours(functions: kernels.Kernels) -> Compute:
        return one(
            lambda packed, scales, code: functions.dequantize_nf4(
                packed, scales.float(), code.float(), blocksize=64, shape=shape, dtype=make.dtype
            )
        )

    def eager(packed: Tensor, scales: Tensor, code: Tensor) -> Tensor:
        halves = torch.stack([packed >> 4, packed & 15], -1).view(-1).int()
        return (code[halves].view(-1, 64) * scales[:, None]).view(shape)

    sides = {name: ours(functions) for name, functions in make.ours().items()}
    sides["eager"] = one(lambda *inputs: eager(*inputs).to(make.dtype))
    if find_spec("bitsandbytes"):
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            scales, shape=torch.Size(shape), code=code, blocksize=64, quant_type="nf4", dtype=make.dtype
        )  # fmt: skip
        sides["bitsandbytes"] = one(lambda packed, scales, code: dequantize_4bit(packed[:, None], state))
    moved = count * (0.5 + 4 / 64 + code.element_size() / 2)
    return Op("dequantize_nf4", (packed, scales, code), sides, one(eager), moved_bytes=moved, backward=False)


# --- attention ---


def attention(make: Maker, kind: str) -> Op:
    """Attention of a packed row: `long` is one document, `short` many, `pairs` prompts with two answers each."""
    shape, tokens = make.shape, make.tokens
    if kind == "pairs":
        total = min(256, tokens // 2)
        samples = synthetic.preference_pairs(max(1, tokens // (total * 5 // 4)), 64, total, 2.15)
    else:
        length = tokens if kind == "long" else max(16, tokens // 16)
        samples = synthetic.documents([length] * (tokens // length), 64)
    batch = pack(samples).to(make.device)
    rows, dim = batch.num_tokens, shape.head_dim
    q, k, v = (make.normal(1, heads, rows, dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    mask, scaling, groups = dense_mask(batch), dim**-0.5, shape.heads // shape.kv_heads

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.repeat_interleave(groups, 1).transpose(2, 3)) * scaling
        wide = torch.promote_types(scores.dtype, torch.float32)
        seen = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1, dtype=wide)
        return (seen.to(v.dtype) @ v.repeat_interleave(groups, 1)).transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
        return output.transpose(1, 2)

    sides: dict[str, Compute] = {}
    for name in attentions.IMPLEMENTATIONS:
        if attentions.why_not(name, make.device, make.dtype) is None:
            ours = attentions.load(name)
            label = "reference" if name == attentions.REFERENCE else name
            sides[label] = one(lambda q, k, v, f=ours: f(q, k, v, batch.plan, scaling=scaling))
    sides |= {"eager": one(eager), "torch-sdpa-mask": one(masked)}
    if kind == "long":
        sides["torch-sdpa-causal"] = one(
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1
            ).transpose(1, 2)
        )
    pairs = int(mask.sum()) if rows <= 8192 else pairs_seen([len(s) for s in samples])
    flops = 3.5 * 4.0 * dim * shape.heads * pairs
    about = {"rows": rows, "documents": len(samples), "mean_keys": round(pairs / rows, 1)}
    return Op(f"attention, {kind}", (q, k, v), sides, one(eager), flops=flops, about=about)


OPS: dict[str, Callable[[Maker], Op]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "token_logps": token_logps,
    "lora_linears": lora_linears,
    "swiglu_lora_linear": swiglu_lora_linear,
    "dequantize_nf4": dequantize_nf4,
    **{f"attention-{kind}": lambda make, kind=kind: attention(make, kind) for kind in ("long", "short", "pairs")},
}


def error(op: Op, side: Compute, truth: Sequence[Tensor]) -> float:
    """The largest relative distance |y - exact| / |exact| over outputs and gradients; `truth` is `results` of exact."""
    found = results(op, side, [t.detach().clone().requires_grad_(t.requires_grad) for t in op.inputs])
    return max(_distance(a, b) for a, b in zip(found, truth, strict=True))


def truth(op: Op) -> list[Tensor]:
    """Outputs and gradients of the formula in float64."""
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in op.inputs
    ]  # fmt: skip
    return results(op, op.exact, wide)


def results(op: Op, side: Compute, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of those inputs that have one, for fixed random gradients of the outputs."""
    outputs = list(side(*inputs))
    if not op.backward:
        return outputs
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    wanted = [t for t in inputs if t.requires_grad]
    given = [
        torch.randn(y.shape, generator=generator, device=y.device).to(op.inputs[0].dtype).to(y.dtype) for y in outputs
    ]
    if outputs[0].ndim == 0:
        given = [torch.ones_like(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, given)]


def _distance(a: Tensor, b: Tensor) -> float:
    found, exact = a.detach().double(), b.detach().double()
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(found - exact)) / norm if norm else math.inf
