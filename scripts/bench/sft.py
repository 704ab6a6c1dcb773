"""Times one SFT step of tuner against TRL on the same machine, model, data and tokens, in one interleaved run.

    python scripts/bench/sft.py                          # bundled chats
    python scripts/bench/sft.py --data my.jsonl --json result.json

Both sides train LoRA (r=16 on every linear) over a random 56 M-parameter Llama (hidden 512, 8 layers, 8 heads, 4 KV
heads, vocabulary 32,000) with about 1,000 tokens an optimizer step, bf16 compute and fp32 adapters; TRL at its best
CPU settings: bf16 weights, no gradient checkpointing, packing (bfd) into rows of 512, two rows a step. Every repeat
is a fresh process, the sides take turns, and the first steps are not counted. Then the floor: the matmuls that a step
cannot do without, at the rate measured for these very shapes; and a profile of where our step's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, INTERMEDIATE = 512, 8, 8, 4, 32_000, 1_408
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
ROW, ROWS = 512, 2  # TRL's packed rows; ROW * ROWS tokens a step on both sides
WARM_UP = 4  # steps not counted
CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)  # fmt: skip

# --- what both sides share ---


def read_pairs(path: Path, limit: int) -> list[dict[str, str]]:
    """Rows of `question`/`answer`, `prompt`/`completion`, or the first exchange of `messages`."""
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "messages" in row:
                turns = [m for m in row["messages"] if m["role"] != "system"]
                pairs.append({"prompt": turns[0]["content"], "completion": turns[1]["content"]})
            else:
                keys = ("question", "answer") if "question" in row else ("prompt", "completion")
                pairs.append({"prompt": row[keys[0]], "completion": row[keys[1]]})
            if len(pairs) == limit:
                break
    return pairs


def make_model(directory: Path, pairs: Iterable[dict[str, str]]) -> None:
    """The random Llama and a byte-level BPE tokenizer trained on the data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tuner.data.templates import TEMPLATES

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=list(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=CONTROL[0], eos_token="<|eot_id|>", pad_token=CONTROL[-1]
    )
    tokenizer.chat_template = TEMPLATES["llama3"].jinja  # TRL renders with it; ours gives the same ids
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=4096, bos_token_id=0,
        eos_token_id=4, pad_token_id=5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class Clock:
    """Wall-clock time and tokens of every step, and the losses of the first two."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.losses: list[float] = []

    def result(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)][WARM_UP:]
        rates = [n / t for n, t in zip(self.tokens[WARM_UP:], steps, strict=False)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_step": statistics.mean(self.tokens[WARM_UP:]),
            "trained_share": sum(self.trained) / sum(self.tokens),
            "step_seconds": statistics.median(steps),
            "peak_memory_bytes": peak,
            "first_losses": self.losses[:2],
        }


# --- one side, in a process of its own ---


def run_tuner(work: Path, steps: int, profile: bool) -> dict[str, Any]:
    """Our side, through the same recipe and stage as the command line."""
    from tuner import recipe as recipes
    from tuner.stages import sft
    from tuner.train import loop, metrics

    recipe = work / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {work / 'model'}, dtype: bfloat16}}\n"
        f"adapter: {{r: {RANK}, lora_alpha: {ALPHA}}}\n"
        f"data: {{train: {work / 'data.jsonl'}, chat_template: llama3, max_length: {ROW}, overlong: truncate}}\n"
        f"train: {{output_dir: {work / f'run-{os.getpid()}'}, batch_unit: tokens, batch_size: {ROW * ROWS},\n"
        f"        learning_rate: {LEARNING_RATE}, lr_scheduler_type: constant, warmup_steps: 0, max_steps: {steps}}}\n"
        f"log: {{save_steps: {10 * steps}}}\n"
    )
    clock, note = Clock(), metrics.Metrics.step

    def timed(self: metrics.Metrics, step: int, report: loop.StepReport) -> None:
        clock.times.append(time.perf_counter())
        clock.tokens.append(report.tokens)
        clock.trained.append(int(report.trained_tokens))
        clock.losses.append(report.losses["nll"])
        note(self, step, report)

    def first(self: metrics.Metrics, step: int) -> None:
        clock.times[0] = time.perf_counter()
        start(self, step)

    start = metrics.Metrics.start
    metrics.Metrics.step, metrics.Metrics.start = timed, first  # type: ignore[method-assign]
    if profile:
        return {"profile": _profiled(loop, lambda: sft.run(recipes.load(recipe, stage="sft")), steps)}
    sft.run(recipes.load(recipe, stage="sft"))
    return clock.result()


def _profiled(loop: Any, run: Callable[[], object], steps: int) -> dict[str, float]:
    """Shares of self CPU time over the second half of the steps, by kind of operation."""
    import torch

    inner, shares = loop.Loop.step, {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def step(self: Any, number: int) -> Any:
        if number == steps // 2:
            profiler.__enter__()
        report = inner(self, number)
        if number == steps - 1:
            profiler.__exit__(None, None, None)
        return report

    loop.Loop.step = step
    run()
    kinds = {
        "matmul": ("aten::mm", "aten::addmm_", "aten::addmm", "aten::linear"),
        "attention and softmax": ("aten::bmm", "aten::_softmax", "aten::_scaled_dot", "aten::masked_fill"),
        "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::empty", "aten::clone"),
        "optimizer and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach"),
    }
    total = 0.0
    for event in profiler.key_averages():
        kind = next((k for k, names in kinds.items() if event.key.startswith(names)), "elementwise and dispatch")
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
        total += event.self_cpu_time_total
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


def run_trl(work: Path, steps: int) -> dict[str, Any]:
    """TRL's SFTTrainer at the settings that were quickest on a CPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (work / "data.jsonl").open(encoding="utf-8")]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        output_dir=str(work / f"trl-{os.getpid()}"), per_device_train_batch_size=ROWS, max_steps=steps, max_length=ROW,
        packing=True, bf16=True, gradient_checkpointing=False, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        model_init_kwargs={"dtype": "bfloat16"}, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    trainer = SFTTrainer(model=str(work / "model"), args=config, train_dataset=dataset, peft_config=lora)
    # bf16 compute with fp32 adapters on both sides; TRL's own cast of them is undone where it makes one
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    clock, inner = Clock(), trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        clock.tokens.append(inputs["input_ids"].numel())
        clock.trained.append(int((inputs["labels"] != -100).sum()))
        return inner(model, inputs, *args, **kwargs)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.times[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.times.append(time.perf_counter())

    trainer.compute_loss = compute_loss
    trainer.add_callback(Timer())
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.result()


# --- the floor ---


def floor(tokens: int, trained: int) -> dict[str, float]:
    """Seconds of the matmuls that a LoRA step cannot do without, each shape at its own measured rate.

    Frozen weights need two matmuls a linear: forward and the gradient of the input. The head needs them for the trained
    positions only. The first layer's input needs no gradient, but its linears' adapters do; that saving is not taken.
    """
    import torch

    head_dim = HIDDEN // HEADS
    kv = KV_HEADS * head_dim
    linears = [(HIDDEN, HIDDEN), (kv, HIDDEN), (kv, HIDDEN), (HIDDEN, HIDDEN)]
    linears += [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    work = [(tokens, shape, LAYERS) for shape in linears] + [(trained, (VOCAB, HIDDEN), 1)]
    seconds = flops = 0.0
    for rows, (out, inner), times in work:
        x, w = torch.randn(rows, inner).bfloat16(), torch.randn(out, inner).bfloat16()
        y, gx = torch.empty(rows, out, dtype=torch.bfloat16), torch.empty(rows, inner, dtype=torch.bfloat16)
        for call in (lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y), lambda w=w, y=y, gx=gx: torch.mm(y, w, out=gx)):
            call()
            best = min(_timed(call) for _ in range(7))
            seconds += times * best
            flops += times * 2.0 * rows * out * inner
    return {"floor_seconds": seconds, "matmul_flops": flops, "matmul_flops_per_second": flops / seconds}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- both sides in turn ---


def child(side: str, work: Path, steps: int, *extra: str) -> dict[str, Any]:
    """Runs one side in a fresh process and reads the JSON in its last line."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work), "--steps", str(steps), *extra]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def spread(results: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    values = [result[key] for result in results]
    return statistics.median(values), min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "chat-train.jsonl")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps a process")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=["tuner", "trl", "profile"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    warnings.filterwarnings("ignore")
    if args.side:
        if args.side == "trl":
            result = run_trl(args.work, args.steps)
        else:
            result = run_tuner(args.work, args.steps, profile=args.side == "profile")
        print("\n" + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        pairs = read_pairs(args.data, limit=1200)
        with (work / "data.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        make_model(work / "model", pairs)
        results: dict[str, list[dict[str, Any]]] = {"tuner": [], "trl": []}
        for repeat in range(args.repeats):
            for side in results:
                results[side].append(child(side, work, args.steps))
                print(f"{repeat + 1}/{args.repeats} {side:<6}{results[side][-1]['tokens_per_second']:>8,.0f} tok/s")
        shares = child("profile", work, 8)["profile"]
    report(results, shares, args.json)


def report(results: dict[str, list[dict[str, Any]]], shares: dict[str, float], out: Path | None) -> None:
    """The table, the floor and our share of it."""
    print(
        f"\n{'':<7}{'tok/s':>8}  {'(min - max)':<18}{'tokens/step':>12}{'trained':>9}{'peak memory':>13}  first losses"
    )
    for side, runs in results.items():
        median, low, high = spread(runs, "tokens_per_second")
        last = runs[-1]
        losses = ", ".join(f"{loss:.4f}" for loss in last["first_losses"])
        print(
            f"{side:<7}{median:>8,.0f}  {f'({low:,.0f} - {high:,.0f})':<18}{last['tokens_per_step']:>12,.0f}"
            f"{last['trained_share']:>9.0%}{spread(runs, 'peak_memory_bytes')[0] / 1e9:>10.2f} GB  {losses}"
        )
    ratios = [
        a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(results["tuner"], results["trl"], strict=True)
    ]
    ours = results["tuner"][-1]
    tokens = round(ours["tokens_per_step"])
    least = floor(tokens, round(tokens * ours["trained_share"]))
    seconds = statistics.median(run["step_seconds"] for run in results["tuner"])
    share = least["floor_seconds"] / seconds
    print(f"\nratio tuner/trl, pair by pair: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    print(
        f"floor: {least['matmul_flops'] / 1e9:.0f} GFLOP of matmul a step at "
        f"{least['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s = {least['floor_seconds']:.3f} s; "
        f"our step {seconds:.3f} s, {share:.0%} of the floor's rate"
    )
    print("where our step goes: " + ", ".join(f"{kind} {value:.0%}" for kind, value in shares.items()))
    if out:
        out.write_text(json.dumps({"runs": results, "ratios": ratios, "floor": least, "profile": shares}, indent=1))


if __name__ == "__main__":
    main()
