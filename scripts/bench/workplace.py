"""What the comparisons with TRL share: a model and data on disk, our side through a recipe, TRL's through its trainer.

Both sides train LoRA (r=16 on every linear, fp32 adapters) over the same random Llama. Every step is timed from the
end of the one before; the first steps are not counted. `parity` runs three steps of either side on one fixed batch,
whatever order a trainer shuffles into, so that their losses can be laid side by side.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from models import Shape

from tuner.errors import UserError

RANK, ALPHA = 16, 32
PARITY_ROWS, PARITY_STEPS = 8, 3
CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)  # fmt: skip

# --- model and data on disk ---


def read_pairs(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of `question`/`answer`, `prompt`/`completion`, or the first exchange of `messages`.

    Raises:
        UserError: the file or a row is something else.
    """
    pairs: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                turns = _turns(json.loads(line))
                pairs.append({"prompt": turns[0], "completion": turns[1]})
                if len(pairs) == limit:
                    break
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSONL file of chats with --data") from None
    except (ValueError, LookupError, TypeError):
        expected = "question and answer, prompt and completion, or messages of two turns"
        raise UserError(f"{path} line {len(pairs) + 1}: expected a JSON object with {expected}") from None
    if not pairs:
        raise UserError(f"{path} holds no rows; give a file with data")
    return pairs


def _turns(row: Mapping[str, Any]) -> list[str]:
    if "messages" in row:
        return [m["content"] for m in row["messages"] if m["role"] != "system"]
    return [row[k] for k in (("question", "answer") if "question" in row else ("prompt", "completion"))]


def as_messages(pairs: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The same as TRL takes them: conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "completion": [{"role": "assistant", "content": pair["completion"]}],
        }
        for pair in pairs
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_model(directory: Path, texts: Iterable[str], shape: Shape) -> None:
    """The random Llama in bf16, and a byte-level BPE tokenizer trained on the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tuner.data.templates import TEMPLATES

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(8000, shape.vocab), special_tokens=list(CONTROL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=CONTROL[0], eos_token="<|eot_id|>", pad_token=CONTROL[-1]
    )
    tokenizer.chat_template = TEMPLATES["llama3"].jinja  # TRL renders with it; ours gives the same ids
    torch.manual_seed(0)
    LlamaForCausalLM(shape.config()).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# --- one side, in a process of its own ---


class Clock:
    """When steps end, and what is in them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []  # without padding
        self.padded: list[int] = []
        self.trained: list[int] = []
        self.losses: list[float] = []

    def start(self) -> None:
        self.times = [time.perf_counter()]

    def note(self) -> None:
        self.times.append(time.perf_counter())

    def result(self, warm_up: int, pairs: int | None = None) -> dict[str, Any]:
        """Rates over the steps after the first `warm_up`; the headline counts tokens without padding, or pairs."""
        seconds = [b - a for a, b in zip(self.times, self.times[1:], strict=False)][warm_up:]
        total = sum(seconds)
        found: dict[str, Any] = {
            "steps": len(seconds),
            "step_seconds": statistics.median(seconds),
            "warm_up_seconds": self.times[warm_up] - self.times[0],
            "first_losses": self.losses[:3],
        }
        counts = {"tokens": self.tokens, "trained_tokens": self.trained, "padded_tokens": self.padded}
        for name, each in counts.items():
            if each:
                found[f"{name}_per_second"] = sum(each[warm_up:]) / total
                found[f"{name}_per_step"] = statistics.mean(each[warm_up:])
        if pairs is not None:
            found["pairs_per_second"] = pairs * len(seconds) / total
        return found


def deep(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the sections of `changes` over its own."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = deep(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def recipe_of(work: Path, data: str, steps: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of our side, `changes` over what all have in common."""
    common_part = {
        "model": {"name_or_path": str(work / "model"), "dtype": "bfloat16"},
        "adapter": {"r": RANK, "lora_alpha": ALPHA},
        "data": {"train": str(work / data), "chat_template": "llama3", "overlong": "truncate", "cache": False},
        "train": {
            "output_dir": str(work / f"run-{os.getpid()}"), "max_steps": steps, "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        "log": {"save_steps": 10 * steps},
    }  # fmt: skip
    return deep(common_part, changes)


def run_recipe(work: Path, stage: str, recipe: Mapping[str, Any]) -> Clock:
    """Our side through the same recipe and stage as the command line; JSON is YAML."""
    from tuner import recipe as recipes
    from tuner.train.metrics import Metrics

    path = work / f"recipe-{os.getpid()}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    clock, step, start = Clock(), Metrics.step, Metrics.start

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.note()
        return step(self, *args, **kwargs)

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.start()
        return start(self, *args, **kwargs)

    Metrics.step, Metrics.start = timed, first  # type: ignore[method-assign]
    importlib.import_module(f"tuner.stages.{stage}").run(recipes.load(path, stage=stage))
    lines = (Path(recipe["train"]["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        if "loss" in line:
            clock.losses.append(line["loss"])
            clock.tokens.append(line["tokens"])
            clock.trained.append(round(line["trained_tokens"]))
    return clock


def run_trl(trainer: Any, fp32_adapters: bool) -> Clock:
    """Trains with a TRL trainer; where asked for, its adapters are put in fp32 as ours are."""
    from transformers import TrainerCallback

    if fp32_adapters:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    clock, inner = Clock(), trainer.compute_loss
    counted: list[tuple[int, int, int]] = []

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "labels" in inputs and "input_ids" in inputs:
            ids, seen = inputs["input_ids"], inputs.get("attention_mask")
            tokens = ids.numel() if seen is None else int(seen.sum())
            counted.append((tokens, ids.numel(), int((inputs["labels"] != -100).sum())))
        return inner(model, inputs, *args, **kwargs)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.note()
            if counted:
                tokens, padded, trained = (sum(column) for column in zip(*counted, strict=True))
                clock.tokens.append(tokens)
                clock.padded.append(padded)
                clock.trained.append(trained)
                counted.clear()

    trainer.compute_loss = compute_loss
    trainer.add_callback(Timer())
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock


def trl_config(work: Path, steps: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a TRL config: what the work asks for, and the `settings` of the side."""
    import torch

    fixed = {
        "output_dir": str(work / f"trl-{os.getpid()}"), "max_steps": steps, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }  # fmt: skip
    return fixed | dict(settings)


BEST = {"bf16": True, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}  # of TRL, anywhere


# --- both sides ---


def quickest(
    script: str, candidates: Mapping[str, common.Side], arguments: Sequence[str], headline: str
) -> tuple[str, dict[str, float]]:
    """The side that is quickest in one process each, and what each of them made; one that fails is no candidate."""
    turns = common.take_turns(script, candidates, arguments, 1, headline)
    tried = {side: float(runs[0][headline]) for side, runs in turns.runs.items() if runs}
    if not tried:
        sys.exit(f"none of them ran: {'; '.join(turns.notes)}")
    return max(tried, key=lambda side: tried[side]), tried


def parity(
    script: str, sides: Mapping[str, common.Side], turns: common.Turns, arguments: Sequence[str]
) -> dict[str, list[float]]:
    """The losses of each side that ran, in its first steps on one batch."""
    return {
        side: common.child(script, side, *arguments, "--parity", environment=sides[side].environment)["first_losses"]
        for side, runs in turns.runs.items()
        if runs
    }
