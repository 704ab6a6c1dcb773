"""Times the preparation of chats for training, tuner against TRL: same rows, tokenizer and row length, in turns.

    python scripts/bench/data.py                                       # bundled chats; --data FILE for others

Ours is everything from the file to packed batches: reading, rendering, tokenising, masks, planning, packing, without
the token cache. TRL's is what SFTTrainer does to a data set that is in memory already: chat template, tokenising,
completion mask, packing (bfd); neither its reading of the file nor its collator is counted. Every repeat is a fresh
process, one a side, with the threads that the tokenizer takes (--threads 1 leaves it one); imports and the loading of
the tokenizer are not counted, and both sides must find the same tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import workplace
from common import Side

MODEL = common.ROOT / "data" / "tiny-llama"
ROW = 2048  # tokens of a packed row
TEMPLATE = "llama3"
SIDES = {"tuner": Side(), "trl": Side({"packing": True, "max_length": ROW})}


class Clock:
    """Seconds on the wall and of this process on a core; the second hardly minds what else the machine does."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


# --- one side, in a process of its own ---


def run_tuner(work: Path) -> dict[str, Any]:
    """From the file to all batches of one epoch."""
    from tuner.data.pack import pack
    from tuner.data.plan import Plan
    from tuner.data.stream import choose_template, load_split
    from tuner.model.load import load_tokenizer
    from tuner.recipe import DataSection

    tokenizer = load_tokenizer(str(work / "model"), None)
    data = DataSection(train=str(work / "data.jsonl"), chat_template=TEMPLATE, max_length=ROW, cache=False)
    clock = Clock()
    template = choose_template(data.train, data, tokenizer)
    split = load_split(data.train, data, tokenizer, template)
    plan = Plan(split.tokens.lengths, batch_size=len(split.tokens), microbatch_tokens=ROW)
    tokens = trained = rows = 0
    for indices in plan.microbatches(0):
        batch = pack([split.tokens[i] for i in indices])
        tokens, trained, rows = tokens + batch.num_tokens, trained + batch.num_predictions, rows + 1
    return clock.read() | {"tokens": tokens, "trained_tokens": trained, "packed_rows": rows}


def run_trl(work: Path) -> dict[str, Any]:
    """SFTTrainer's own preparation, timed where its constructor calls it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(workplace.as_messages(workplace.read_pairs(work / "data.jsonl")))
    config = SFTConfig(
        output_dir=str(work / "trl"), max_length=ROW, packing=True, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    found: dict[str, Any] = {}
    prepare = SFTTrainer._prepare_dataset

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock = Clock()
        prepared = prepare(*args, **kwargs)
        found["times"], found["data"] = clock.read(), prepared
        return prepared

    SFTTrainer._prepare_dataset = timed  # type: ignore[method-assign]
    SFTTrainer(model=str(work / "model"), args=config, train_dataset=dataset)
    tokens = trained = rows = 0
    for row in found["data"]:
        labelled = sum(label != -100 for label in row["labels"])
        tokens, trained, rows = tokens + len(row["input_ids"]), trained + labelled, rows + 1
    return found["times"] | {"tokens": tokens, "trained_tokens": trained, "packed_rows": rows}


# --- both sides in turn ---


def make_work(work: Path, data: Path, limit: int | None) -> int:
    """The rows, and the bundled model with the template that both sides render. Returns the number of rows."""
    from tuner.data.templates import TEMPLATES

    pairs = workplace.read_pairs(data, limit)
    workplace.write_rows(work / "data.jsonl", pairs)
    shutil.copytree(MODEL, work / "model")
    settings = work / "model" / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(config | {"chat_template": TEMPLATES[TEMPLATE].jinja}), encoding="utf-8")
    (work / "model" / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the settings
    return len(pairs)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, default=common.ROOT / "data" / "chat-train.jsonl")
    parser.add_argument("--limit", type=common.count, help="rows to use")
    parser.add_argument("--repeats", type=common.count, default=5, help="processes a side")
    parser.add_argument("--threads", type=common.count, help="threads a process; default: as many as cores")
    parser.add_argument("--output", type=common.output, help="where the results go; default: results/data.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.answer({"tuner": run_tuner, "trl": run_trl}[args.side](args.work))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = make_work(Path(temporary), args.data, args.limit)
        common.PLAIN["HF_DATASETS_CACHE"] = str(Path(temporary) / "datasets")
        if args.threads:
            common.PLAIN.update(dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(args.threads)))
        turns = common.take_turns(__file__, SIDES, ["--work", temporary], args.repeats, "seconds")
    settings = {"data": args.data.name, "rows": rows, "row_tokens": ROW, "template": TEMPLATE, "threads": args.threads}
    one = common.case(
        "preparation of chats", "seconds", SIDES, turns.runs, settings=settings, better="lower", against="trl",
        notes=turns.notes,
    )  # fmt: skip
    common.show(one)
    counts = {(run["tokens"], run["trained_tokens"]) for runs in turns.runs.values() for run in runs}
    if len(counts) > 1:
        sys.exit(f"the sides disagree about (tokens, trained tokens): {sorted(counts)}")
    common.write("data", [one], args.output)


if __name__ == "__main__":
    common.run(main)
