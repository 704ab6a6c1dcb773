"""Times one step of a reward model, tuner against TRL: same pairs, model and adapter, in one interleaved run.

    python scripts/bench/reward.py --data my_pairs.jsonl [--repeats 5] [--json result.json]

Set up as `pairs.py` says, over a classifier of one label; pairs longer than 1,024 tokens are left out on both sides,
since TRL would leave them out. TRL at the settings that were quickest on a CPU: bf16 weights, no gradient
checkpointing, and the quickest of 1, 2 and 4 pairs at a time, of which each is tried first in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pairs
import sft

BATCHES = (1, 2, 4)  # pairs at a time, of TRL


def run_trl(work: Path, steps: int, batch: int) -> dict[str, Any]:
    """TRL's RewardTrainer."""
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**pairs.trl_settings(work, steps, batch))
    lora = LoraConfig(r=sft.RANK, lora_alpha=sft.ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    data = pairs.trl_data(work)
    trainer = RewardTrainer(model=str(work / "model"), args=config, train_dataset=data, peft_config=lora)
    assert len(trainer.train_dataset) == len(data), "TRL has left pairs out"
    return pairs.time_trl(trainer)


def make_classifier(directory: Path) -> None:
    """Puts a random score head in the place of the language head."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    lm = LlamaForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.bfloat16)
    lm.save_pretrained(directory)


def fitting(found: Sequence[dict[str, Any]], model: Path) -> list[dict[str, Any]]:
    """The pairs of which no side is longer than a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def length(pair: dict[str, Any], side: str) -> int:
        return len(tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False))

    return [p for p in found if max(length(p, "chosen"), length(p, "rejected")) <= pairs.LENGTH]


def main() -> None:
    parser = pairs.arguments(str(__doc__), ["tuner", *(f"trl-{batch}" for batch in BATCHES)])
    args = parser.parse_args()
    if args.side == "tuner":
        print("\n" + json.dumps(pairs.run_recipe(args.work, "reward", args.steps, "loss: {type: bradley_terry}")))
    elif args.side:
        print("\n" + json.dumps(run_trl(args.work, args.steps, int(args.side.removeprefix("trl-")))))
    if args.side:
        return
    found = pairs.usable(args.data, limit=600)
    with pairs.workplace(found) as work:
        make_classifier(work / "model")
        pairs.write_pairs(work, fitting(found, work / "model"), args.steps)
        tried = {f"trl-{batch}": pairs.child(__file__, f"trl-{batch}", work, args.steps) for batch in BATCHES}
        best = max(tried, key=lambda side: tried[side]["pairs_per_second"])
        rates = ", ".join(f"{side[4:]}: {result['pairs_per_second']:.2f}" for side, result in tried.items())
        print(f"TRL by pairs at a time (pairs/s): {rates}", flush=True)
        results = pairs.take_turns(__file__, ["tuner", best], work, args.repeats, args.steps)
    pairs.report(results, args.json)


if __name__ == "__main__":
    main()
