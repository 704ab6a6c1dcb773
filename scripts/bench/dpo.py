"""Times one DPO step of tuner against TRL: same pairs a step, model, truncation and adapter, in one interleaved run.

    python scripts/bench/dpo.py --data my_pairs.jsonl [--repeats 5] [--ladder] [--json result.json]

Set up as `pairs.py` says: rows of at most 1,024 tokens, the reference computed in every step by the model without its
adapter. TRL at the settings that were quickest on a CPU: bf16 weights, no gradient checkpointing, one pair at a time.
`--ladder` adds our side with its ideas taken away (one pair at a time; packed, but each answer with a prompt of its
own) and with the reference's log-probs kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pairs
import sft

BETA = 0.1
LADDER = ("alone", "unshared", "tuner", "cached")


def run_tuner(work: Path, steps: int, idea: str) -> dict[str, Any]:
    """Our side, with or without some of its ideas."""
    from tuner.train import loop

    if idea in ("alone", "unshared"):
        loop.pack = _unshared(loop.pack)  # type: ignore[attr-defined]
    cached, packing = str(idea == "cached").lower(), str(idea != "alone").lower()
    sections = f"loss: {{type: sigmoid, beta: {BETA}}}\nreference: {{cache: {cached}}}"
    return pairs.run_recipe(work, "dpo", steps, sections, f"overlong: truncate, packing: {packing}")


def _unshared(pack: Any) -> Any:
    """The batch that one gets where the prompt is run for each answer: the attention of a pair, twice its prompt."""
    from dataclasses import replace

    import torch

    from tuner.types import Tokens

    def packed(samples: Any, multiple: int = 1) -> Any:
        halves = [Tokens(s.trunk, (branch,), s.source, s.row) for s in samples for branch in s.branches]
        batch = pack(halves, multiple)
        return replace(batch, seq_doc=batch.seq_doc // 2, seq_branch=batch.seq_doc % 2 + torch.ones_like(batch.seq_doc))

    return packed


def run_trl(work: Path, steps: int) -> dict[str, Any]:
    """TRL's DPOTrainer."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**pairs.trl_settings(work, steps, batch=1), beta=BETA)
    lora = LoraConfig(r=sft.RANK, lora_alpha=sft.ALPHA, target_modules="all-linear")
    data = pairs.trl_data(work)
    return pairs.time_trl(DPOTrainer(model=str(work / "model"), args=config, train_dataset=data, peft_config=lora))


def main() -> None:
    parser = pairs.arguments(str(__doc__), [*LADDER, "trl"])
    parser.add_argument("--ladder", action="store_true", help="also our side with its ideas taken away")
    args = parser.parse_args()
    if args.side:
        result = run_trl(args.work, args.steps) if args.side == "trl" else run_tuner(args.work, args.steps, args.side)
        print("\n" + json.dumps(result))
        return
    found = pairs.usable(args.data, limit=600)
    with pairs.workplace(found) as work:
        pairs.write_pairs(work, found, args.steps)
        sides = [*(LADDER if args.ladder else ("tuner",)), "trl"]
        results = pairs.take_turns(__file__, sides, work, args.repeats, args.steps)
    pairs.report(results, args.json)


if __name__ == "__main__":
    main()
