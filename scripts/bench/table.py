"""The results under `results/` as one Markdown table; README has it between two markers.

    python scripts/bench/table.py                        # prints it
    python scripts/bench/table.py --write                # puts it into README

A cell without a measurement stays empty. What a row is called and where it comes from stands in SECTIONS.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

README = common.ROOT / "README.md"
BEGIN, END = "<!-- results: scripts/bench/table.py --write -->", "<!-- end of results -->"
BEST = "(best)"  # stands for the side that the others are compared with

Show = Callable[[float], str]


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g}"


def percent(value: float) -> str:
    return f"{value:.0%}"


@dataclass(frozen=True)
class Section:
    """Rows of one case: side -> what it is called. `value` names another number of a run than the headline.

    Without a title the rows belong to the section before.
    """

    title: str
    file: str
    case: str
    rows: Mapping[str, str]
    show: Show = count
    value: str | None = None


def two(how: str) -> dict[str, str]:
    """The sides of peak memory, of one way to train."""
    return {
        "tuner": f"tuner, {how}",
        "tuner-selective": "... selective checkpointing",
        "tuner-checkpointing": "... checkpointing",
        "trl": f"TRL, {how}",
        "trl-checkpointing": "... checkpointing",
    }


LADDER = {
    "one-at-a-time": "tuner, one chat at a time, every position scored, plain modules",
    "packed": "... packed, one dense mask",
    "by-document": "... attention by document",
    "answers-only": "... only the answers scored",
    "fused-lora": "... LoRA linears fused",
    "tuner": "tuner: ... norms, MLP, rotation and layers fused",
    "trl-default": "TRL at its defaults",
    BEST: "TRL at its best",
}
PAIRS = {
    "one-at-a-time": "tuner, one pair at a time",
    "packed": "... packed, each answer with a prompt of its own",
    "tuner": "tuner: ... the prompt shared",
    "tuner-cached": "tuner, the reference's log-probs kept",
    "trl-default": "TRL at its defaults",
    BEST: "TRL at its best",
}
KERNELS = {
    "add_rms_norm": "sum and RMSNorm",
    "rope": "rotation",
    "token_logps": "log-probs of targets",
    "lora_linears": "three LoRA linears",
    "swiglu_lora_linear": "SwiGLU and LoRA linear",
    "attention, short": "attention, many short documents",
    "attention, pairs": "attention, shared prompts",
    "attention, long": "attention, one document",
}
PHASES = ("setup", "data", "model", "evaluation before", "training", "evaluation after", "saving")

WHOLE = "SFT, LoRA, documents of 4,096 tokens"


def kernels(file: str, side: str) -> list[Section]:
    """A row for each operation: ours, over the same by eager torch."""
    return [Section("", file, op, {side: label}, milliseconds) for op, label in KERNELS.items()]


SECTIONS: tuple[Section, ...] = (
    Section("SFT of a 56 M Llama, LoRA, tokens/s", "sft", "SFT, LoRA", LADDER),
    Section("DPO of the same, LoRA, pairs/s", "dpo", "DPO, LoRA", PAIRS),
    Section(
        "reward model of the same, LoRA, pairs/s",
        "reward",
        "reward model, LoRA",
        {"tuner": "tuner", "trl-default": "TRL at its defaults", BEST: "TRL at its best"},
    ),
    Section("preparation of the data, seconds", "data", "preparation of chats", {"tuner": "tuner", "trl": "TRL"}),
    Section("peak memory of the same work, GB", "memory", "peak memory, full", two("full fine-tuning"), gigabytes),
    Section("", "memory", "peak memory, lora", two("LoRA"), gigabytes),
    Section("", "memory", "peak memory, qlora", two("QLoRA"), gigabytes),
    Section("kernels, forward and backward, ms, against eager torch", "kernels", "", {}),
    *kernels("kernels", "reference"),
    Section(
        "SFT of an 8B Llama on a GPU, LoRA, documents of 4,096, tokens/s, against plain torch kernels",
        "h200-sft",
        WHOLE,
        {
            "triton": "tuner",
            "triton-16k": "tuner, 16,384 tokens at once",
            "qlora": "tuner, 4-bit base",
            "reference": "tuner, plain torch kernels",
        },
    ),
    Section("", "h200-sft", WHOLE, {"triton": "tuner: model FLOPs used (MFU)"}, percent, "mfu"),
    Section(
        "", "h200-sft", WHOLE, {"triton": "tuner: bytes of activations a token"}, count, "activation_bytes_per_token"
    ),
    Section("", "h200-sft", "SFT, LoRA, short documents, packed", {"triton": "tuner, short documents, packed"}),
    Section(
        "DPO of an 8B Llama on a GPU, LoRA, lengths of HH, pairs/s, against transformers and peft, padded",
        "h200-dpo",
        "DPO, LoRA, lengths of HH",
        {"tuner": "tuner", "tuner-unshared": "tuner, no prompt shared", BEST: "transformers and peft"},
    ),
    Section(
        "longest context of an 8B Llama on a GPU, tokens",
        "h200-memory",
        "longest context, one document",
        {
            "triton": "tuner",
            "triton-selective": "... selective checkpointing",
            "triton-checkpointing": "... checkpointing",
            "qlora-checkpointing": "... and a 4-bit base",
        },
    ),
    Section("kernels on a GPU, forward and backward, ms, against eager torch", "h200-kernels", "", {}),
    *kernels("h200-kernels", "triton"),
)

# --- from results to rows ---


def table(folder: Path) -> str:
    """The Markdown of all sections, from the results in `folder`."""
    lines = ["| | median | range | times as good | peak memory | loss, difference |", "|---|---|---|---|---|---|"]
    for section in SECTIONS:
        lines += rows_of(section, load(folder, section.file))
    lines += waiting(load(folder, "startup"))
    return "\n".join([*lines, "", *legend(folder)])


def load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return common.read(path) if path.is_file() else None


def rows_of(section: Section, result: Mapping[str, Any] | None) -> list[str]:
    """A section's heading, and a row for each side."""
    case = find(result, section.case)
    lines = [f"| **{section.title}** | | | | | |"] if section.title else []
    for side, label in section.rows.items():
        told = case["sides"].get(case["against"] if side == BEST else side) if case else None
        shown = " | ".join(cells(section, case, side, told))
        lines.append(f"| {label} | {shown} |" if shown.strip(" |") else f"| {label} | | | | | |")
    least = case["floor"] if case and section.value is None else None
    if least and least.get("share") is not None:
        lines.append(f"| share of our step that no implementation could spare | {least['share']:.0%} | | | | |")
    return lines


def find(result: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    return next((dict(case) for case in result["cases"] if case["name"] == name), None) if result else None


def cells(section: Section, case: Mapping[str, Any] | None, side: str, told: Mapping[str, Any] | None) -> Sequence[str]:
    """Median, range, ratio, memory and loss of one side; empty where nothing was measured."""
    if case is None or told is None:
        return [""] * 5
    name = section.value or case["headline"]
    values = [run[name] for run in told["runs"] if run.get(name) is not None]
    if not values:
        return [""] * 5
    median, low, high = common.middle(values)
    spread = f"{section.show(low)} - {section.show(high)}" if len(values) > 1 else ""
    ratio = case["ratios"].get(side) if section.value is None else None
    times = f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})" if ratio else ""
    peak = [run["peak_memory_bytes"] for run in told["runs"] if run.get("peak_memory_bytes") is not None]
    memory = f"{gigabytes(statistics.median(peak))} GB" if peak and name != "peak_memory_bytes" else ""
    off = case["loss_differences"].get(side)
    return [section.show(median), spread, times, memory, f"{max(map(abs, off)):.1e}" if off else ""]


def waiting(result: Mapping[str, Any] | None) -> list[str]:
    """What one waits for: the commands, and the quickstart by phase."""
    lines = ["| **waiting, seconds** | | | | | |"]
    waits, whole = find(result, "waiting"), find(result, "quickstart")
    for command in ("tuner --help", "plan, without a token cache", "plan, tokens cached"):
        lines.append(row(command, [run["seconds"] for run in waits["sides"][command]["runs"]] if waits else []))
    runs = whole["sides"]["tuner"]["runs"] if whole else []
    lines.append(row("the training of `scripts/quickstart`", [run["seconds"] for run in runs]))
    for phase in PHASES:
        lines.append(row(f"... {phase}", [run["phases_seconds"].get(phase, 0.0) for run in runs]))
    return lines


def row(label: str, seconds: Sequence[float]) -> str:
    if not seconds:
        return f"| {label} | | | | | |"
    median, low, high = common.middle(seconds)
    return f"| {label} | {median:.2f} | {low:.2f} - {high:.2f} | | | |"


def legend(folder: Path) -> list[str]:
    """Where, when and at which commit each file was measured."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = common.read(path)
        machine, versions = result["machine"], result["versions"]
        where = ", ".join(machine.get("gpus") or []) or f"{machine.get('cpu') or 'a CPU'}, {machine['cores']} cores"
        commit = (result["commit"] or "not recorded")[:10] + (" and changes" if result["dirty"] else "")
        named = [f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if versions.get(name)]
        lines.append(f"- `{path.name}`: {where}; {', '.join(named)}; commit {commit}; {str(result['date'])[:10]}")
    return lines


# --- README ---


def put(text: str, made: str) -> str:
    """README with the table between its markers."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        sys.exit(f"README lacks the line {BEGIN} or {END}, between which the table goes")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README")
    args = parser.parse_args()
    made = table(common.RESULTS)
    if not args.write:
        sys.stdout.write(made + "\n")
        return
    text = README.read_text(encoding="utf-8")
    README.write_text(put(text, made), encoding="utf-8")


if __name__ == "__main__":
    common.run(main)
