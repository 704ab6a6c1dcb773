"""The Llamas that benchmarks run: shapes by name, all with random weights, and what their matmuls are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a Llama; widths in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears of a layer: name -> (out, in)."""
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linears of all layers."""
        return self.layers * sum(out * inner for out, inner in self.linears().values())

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Parameters of an adapter on every linear of the layers."""
        return self.layers * sum(rank * (out + inner) for out, inner in self.linears().values())

    def changed(self, **changes: int | bool) -> Shape:
        return replace(self, **changes)

    def config(self, positions: int = 4096) -> Any:
        """The same as transformers has it; the ids are those of the benchmarks' own tokenizer."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions, bos_token_id=0, eos_token_id=4, pad_token_id=5,
            tie_word_embeddings=self.tied, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512),  # for tests of the benchmarks themselves
    "20m": Shape(320, 6, 5, 5, 864, 32_000),
    "56m": Shape(512, 8, 8, 4, 1_408, 32_000),
    "110m": Shape(768, 10, 12, 4, 2_048, 32_000),
    "1b": Shape(2_048, 16, 32, 8, 8_192, 128_256, tied=True),  # Llama 3.2 1B
    "8b": Shape(4_096, 32, 32, 8, 14_336, 128_256),  # Llama 3 8B
}
