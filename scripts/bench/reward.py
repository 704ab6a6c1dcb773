"""Times a reward model of tuner against TRL at its defaults and at its best: same pairs, model and adapter, in turns.

    python scripts/bench/reward.py --data my_pairs.jsonl

Set up as `pairs.py` says, over a classifier of one label; pairs longer than 1,024 tokens are left out on both sides,
since TRL would leave them out. TRL's defaults are what `RewardConfig` gives, with 8 pairs at once; at its best it has
bf16 weights, no checkpointing, and the quickest of 1, 2, 4 and 8 pairs at a time, each tried first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import models
import pairs
import workplace
from common import Side

TRL: dict[str, dict[str, Any]] = {
    "trl-default": pairs.trl_settings(None),
    **{f"trl-{batch}": pairs.trl_settings(batch) for batch in pairs.BATCHES},
}


def run_trl(work: Path, steps: int, side: str, parity: bool) -> dict[str, Any]:
    """TRL's RewardTrainer."""
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**workplace.trl_config(work, steps, TRL[side]))
    lora = LoraConfig(
        r=workplace.RANK, lora_alpha=workplace.ALPHA, target_modules="all-linear", task_type="SEQ_CLS"
    )  # fmt: skip
    data = pairs.trl_data(work, parity)
    trainer = RewardTrainer(model=str(work / "model"), args=config, train_dataset=data, peft_config=lora)
    assert len(trainer.train_dataset) == len(data), "TRL has left pairs out"
    clock = workplace.run_trl(trainer, fp32_adapters=side != "trl-default")
    return clock.result(0 if parity else pairs.WARM_UP, pairs=pairs.PAIRS)


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
    args = pairs.arguments(str(__doc__), ["tuner", *TRL]).parse_args()
    if args.side == "tuner":
        loss = {"loss": {"type": "bradley_terry"}}
        common.answer(pairs.run_ours(args.work, "reward", args.steps, args.parity, loss))
    elif args.side:
        common.answer(run_trl(args.work, args.steps, args.side, args.parity))
    if args.side:
        return
    found = pairs.usable(args.data, limit=600)
    with pairs.prepared(found, models.SHAPES[args.model]) as work:
        make_classifier(work / "model")
        pairs.write_pairs(work, fitting(found, work / "model"), args.steps)
        arguments = ["--work", str(work), "--steps", str(args.steps)]
        trl = {side: Side(settings, args.trl_environment) for side, settings in TRL.items()}
        candidates = {side: how for side, how in trl.items() if side != "trl-default"}
        best, tried = workplace.quickest(__file__, candidates, arguments, "pairs_per_second")
        sides = {"tuner": Side(), "trl-default": trl["trl-default"], best: trl[best]}
        turns = common.take_turns(__file__, sides, arguments, args.repeats, "pairs_per_second")
        few = ["--work", str(work), "--steps", str(workplace.PARITY_STEPS)]
        losses = workplace.parity(__file__, sides, turns, few)
    one = common.case(
        "reward model, LoRA",
        "pairs_per_second",
        sides,
        turns.runs,
        settings=pairs.settings(args, tried),
        against=best,
        parity=losses,
        notes=["weights and score head are random; parity is on one batch of 8 pairs, three steps", *turns.notes],
    )
    common.show(one)
    common.write("reward", [one], args.output)


if __name__ == "__main__":
    common.run(main)
