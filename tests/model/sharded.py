"""The gradients of a fused policy on ranks that share its weights (FSDP2), for `test_sharded.py`; run by torchrun.

python -m torch.distributed.run --nproc-per-node=2 tests/model/sharded.py OUTPUT lora|full none|selective|everything
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.data.pack import pack
from tuner.model.fuse import Recompute, fuse
from tuner.model.policy import Policy
from tuner.types import Tokens, span

# What layers make again.
RECOMPUTE: dict[str, Recompute] = {"none": False, "selective": "selective", "everything": True}


def policy_of(kind: str, recompute: str) -> Policy:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(config)
    if kind == "lora":
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fuse(lm, recompute=RECOMPUTE[recompute])
    return Policy(lm, compute_dtype=torch.float32)


def samples() -> list[Tokens]:
    """Four pairs: a trunk and two branches each."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> Tensor:
        return torch.randint(0, 97, (n,), generator=g)

    return [
        Tokens((span(ids(7 + i), False),), ((span(ids(5), True),), (span(ids(3 + i), True),)), "pairs.jsonl", i)
        for i in range(4)
    ]


def step(policy: Policy, rows: list[Tokens], share: float) -> dict[str, Tensor]:
    """Every gradient of `share` times the sum of the log-probs."""
    (policy(pack(rows)).sum() * share).backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items() if g is not None}


def main() -> None:
    output, kind, recompute = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    policy = policy_of(kind, recompute)
    for layer in policy.inner.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    rows = samples()
    gradients = step(policy, rows[rank::ranks], float(ranks))  # FSDP averages over ranks
    if rank == 0:
        save_file({name: g.contiguous() for name, g in gradients.items()}, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
