"""Times DPO of tuner against TRL at its defaults and at its best: same pairs, model, truncation and adapter, in turns.

    python scripts/bench/dpo.py --data my_pairs.jsonl
    python scripts/bench/dpo.py --data my_pairs.jsonl --ladder      # also what each of our ideas brings

Set up as `pairs.py` says; the reference is computed in every step by the model without its adapter. TRL's defaults are
what `DPOConfig` gives, with 8 pairs at once; at its best it has bf16 weights, no checkpointing, and the quickest of 1,
2, 4 and 8 pairs at a time, each tried first. `--ladder` adds our side with its ideas taken away (one pair at a time;
packed, but each answer with a prompt of its own), and both sides with the reference's log-probs worked out beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models
import pairs
import workplace
from common import Side

BETA = 0.1
LADDER: dict[str, dict[str, Any]] = {
    "one-at-a-time": {"packing": False, "shared": False, "cached": False},
    "packed": {"packing": True, "shared": False, "cached": False},
    "tuner": {"packing": True, "shared": True, "cached": False},
    "tuner-cached": {"packing": True, "shared": True, "cached": True},
}
TRL: dict[str, dict[str, Any]] = {
    "trl-default": pairs.trl_settings(None),
    **{f"trl-{batch}": pairs.trl_settings(batch) for batch in pairs.BATCHES},
    **{
        f"trl-{batch}-cached": pairs.trl_settings(batch) | {"precompute_ref_log_probs": True} for batch in pairs.BATCHES
    },
}


def run_tuner(work: Path, steps: int, rung: str, parity: bool) -> dict[str, Any]:
    """Our side, with the ideas of a rung."""
    how = LADDER[rung]
    if not how["shared"]:
        from tuner.data import pack

        pack.pack = _unshared(pack.pack)  # before anything has taken hold of it
    changes = {
        "data": {"packing": how["packing"]},
        "loss": {"type": "sigmoid", "beta": BETA},
        "reference": {"cache": how["cached"]},
    }
    return pairs.run_ours(work, "dpo", steps, parity, changes)


def _unshared(pack: Callable[..., Any]) -> Callable[..., Any]:
    """The batch that one gets where the prompt is run for each answer: without a trunk, every branch is a beginning."""
    from tuner.types import Tokens

    def packed(samples: Any, multiple: int = 1) -> Any:
        return pack([Tokens((), tuple((*s.trunk, *b) for b in s.branches), s.source, s.row) for s in samples], multiple)

    return packed


def run_trl(work: Path, steps: int, side: str, parity: bool) -> dict[str, Any]:
    """TRL's DPOTrainer."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**workplace.trl_config(work, steps, TRL[side]), beta=BETA)
    lora = LoraConfig(r=workplace.RANK, lora_alpha=workplace.ALPHA, target_modules="all-linear")
    data = pairs.trl_data(work, parity)
    trainer = DPOTrainer(model=str(work / "model"), args=config, train_dataset=data, peft_config=lora)
    clock = workplace.run_trl(trainer, fp32_adapters=side != "trl-default")
    clock.tokens.clear()  # of pairs, tokens are what a layout makes of them
    clock.padded.clear()
    clock.trained.clear()
    return clock.result(0 if parity else pairs.WARM_UP, pairs=pairs.PAIRS)


def main() -> None:
    parser = pairs.arguments(str(__doc__), [*LADDER, *TRL])
    parser.add_argument("--ladder", action="store_true", help="also our side with its ideas taken away")
    args = parser.parse_args()
    if args.side:
        run = run_trl if args.side in TRL else run_tuner
        common.answer(run(args.work, args.steps, args.side, args.parity))
        return
    found = pairs.usable(args.data, limit=600)
    with pairs.prepared(found, models.SHAPES[args.model]) as work:
        pairs.write_pairs(work, found, args.steps)
        arguments = ["--work", str(work), "--steps", str(args.steps)]
        trl = {side: Side(settings, args.trl_environment) for side, settings in TRL.items()}
        candidates = {f"trl-{batch}": trl[f"trl-{batch}"] for batch in pairs.BATCHES}
        best, tried = workplace.quickest(__file__, candidates, arguments, "pairs_per_second")
        ours = {rung: Side(how) for rung, how in LADDER.items() if args.ladder or rung == "tuner"}
        theirs = ["trl-default", best, *([f"{best}-cached"] if args.ladder else [])]
        sides = ours | {side: trl[side] for side in theirs}
        turns = common.take_turns(__file__, sides, arguments, args.repeats, "pairs_per_second")
        few = ["--work", str(work), "--steps", str(workplace.PARITY_STEPS)]
        losses = workplace.parity(__file__, sides, turns, few)
    one = common.case(
        "DPO, LoRA",
        "pairs_per_second",
        sides,
        turns.runs,
        settings=pairs.settings(args, tried) | {"beta": BETA},
        against=best,
        parity=losses,
        notes=["weights are random; parity is on one batch of 8 pairs, three steps", *turns.notes],
    )
    common.show(one)
    common.write("dpo", [one], args.output)


if __name__ == "__main__":
    common.run(main)
