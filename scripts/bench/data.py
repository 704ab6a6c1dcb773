"""Times the preparation of chats for training, tuner against TRL: same rows, tokenizer and row length, in turns.

    python scripts/bench/data.py --data my.jsonl                       # rows of question/answer or prompt/completion
    python scripts/bench/data.py --data my.jsonl --output result.json

Ours is everything from the file to packed batches: reading, rendering, tokenising, masks, planning, packing, without
the token cache. TRL's is what SFTTrainer does to a data set that is in memory already: chat template, tokenising,
completion mask, packing (bfd); neither its reading of the file nor its collator is counted. Every repeat is a fresh
process, one a side, with the threads that the tokenizer takes (--threads 1 leaves it one); imports and the loading of
the tokenizer are not counted, and both sides must find the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "data" / "tiny-llama"
ROW = 2048  # tokens of a packed row
TEMPLATE = "llama3"

# --- what both sides share ---


def read_pairs(path: Path, limit: int | None) -> list[dict[str, str]]:
    """Rows of `question`/`answer` or `prompt`/`completion`, or the first exchange of `messages`."""
    pairs: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if "messages" in row:
                turns = [m["content"] for m in row["messages"] if m["role"] != "system"]
            else:
                turns = [row[k] for k in (("question", "answer") if "question" in row else ("prompt", "completion"))]
            pairs.append({"prompt": turns[0], "completion": turns[1]})
            if len(pairs) == limit:
                break
    return pairs


class Clock:
    """Seconds on the wall and of this process on a core; the second hardly minds what else the machine does."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def result(times: dict[str, float], tokens: int, trained: int, rows: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **times,
        "tokens": tokens,
        "trained_tokens": trained,
        "packed_rows": rows,
        "peak_memory_bytes": peak,
    }


# --- one side, in a process of its own ---


def run_tuner(work: Path) -> dict[str, Any]:
    """From the file to all batches of one epoch."""
    from tuner.data.pack import pack
    from tuner.data.stream import Plan, choose_template, load_split
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
    return result(clock.read(), tokens, trained, rows)


def run_trl(work: Path) -> dict[str, Any]:
    """SFTTrainer's own preparation, timed where its constructor calls it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                "completion": [{"role": "assistant", "content": pair["completion"]}],
            }
            for pair in read_pairs(work / "data.jsonl", None)
        ]
    )
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
    return result(found["times"], tokens, trained, rows)


# --- both sides in turn ---


def child(side: str, work: Path, threads: int | None) -> dict[str, Any]:
    """Runs one side in a fresh process and reads the JSON in its last line."""
    # both get what `tuner` sets for itself
    threaded = {"TOKENIZERS_PARALLELISM": "true"}
    if threads:
        threaded |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment = os.environ | threaded | quiet | {"HF_DATASETS_CACHE": str(work / "datasets")}
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def make_work(work: Path, data: Path, limit: int | None) -> int:
    """The rows, and the bundled model with the template that both sides render. Returns the number of rows."""
    from tuner.data.templates import TEMPLATES

    pairs = read_pairs(data, limit)
    with (work / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    shutil.copytree(MODEL, work / "model")
    settings = work / "model" / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(config | {"chat_template": TEMPLATES[TEMPLATE].jinja}), encoding="utf-8")
    (work / "model" / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the settings
    return len(pairs)


def report(results: dict[str, list[dict[str, Any]]], rows: int, output: Path | None) -> None:
    """The table and the ratio; ends with an error if the sides disagree about the tokens."""
    print(
        f"\n{'':<7}{'seconds':>9}  {'(min - max)':<18}{'on a core':>9}{'rows/s':>9}"
        f"{'tokens':>12}{'trained':>12}{'peak memory':>13}"
    )
    for side, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        median, last = statistics.median(seconds), runs[-1]
        memory = statistics.median(run["peak_memory_bytes"] for run in runs)
        print(
            f"{side:<7}{median:>9.2f}  {f'({min(seconds):.2f} - {max(seconds):.2f})':<18}"
            f"{statistics.median(run['cpu_seconds'] for run in runs):>9.2f}{rows / median:>9,.0f}"
            f"{last['tokens']:>12,}{last['trained_tokens']:>12,}{memory / 1e9:>10.2f} GB"
        )
    ratios = {}
    for kind, name in (("seconds", "time"), ("cpu_seconds", "time on a core")):
        pairs = zip(results["tuner"], results["trl"], strict=True)
        ratios[kind] = [theirs[kind] / ours[kind] for ours, theirs in pairs]
        low, high = min(ratios[kind]), max(ratios[kind])
        print(f"TRL's {name} over ours, pair by pair: {statistics.median(ratios[kind]):.2f} ({low:.2f} - {high:.2f})")
    if output:
        output.write_text(json.dumps({"rows": rows, "runs": results, "ratios": ratios}, indent=1), encoding="utf-8")
    counts = {(run["tokens"], run["trained_tokens"]) for runs in results.values() for run in runs}
    if len(counts) > 1:
        sys.exit(f"the sides disagree about (tokens, trained tokens): {sorted(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "chat-train.jsonl")
    parser.add_argument("--limit", type=int, help="rows to use")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side")
    parser.add_argument("--threads", type=int, help="threads a process, of both sides; default: as many as cores")
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--side", choices=["tuner", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.side:
        print("\n" + json.dumps({"tuner": run_tuner, "trl": run_trl}[args.side](args.work)))
        return
    results: dict[str, list[dict[str, Any]]] = {"tuner": [], "trl": []}
    with tempfile.TemporaryDirectory() as temporary:
        rows = make_work(Path(temporary), args.data, args.limit)
        for repeat in range(args.repeats):
            for side, runs in results.items():
                runs.append(child(side, Path(temporary), args.threads))
                print(f"{repeat + 1}/{args.repeats} {side:<6}{runs[-1]['seconds']:>7.2f} s", flush=True)
    report(results, rows, args.output)


if __name__ == "__main__":
    main()
