"""Base + LoRA adapter -> one plain Hugging Face directory, and the proof that it scores like the two together.

    tuner merge --adapter runs/chat [--output DIR]

The adapter of a reward model becomes a classifier of one label, whose score head stays in fp32 whatever the rest is
stored in: in a narrower one few rewards would be distinct.

W + s B A is added up in fp32 and cast once. A QLoRA adapter has learnt to correct the *quantised* base, so it is merged
onto that base, dequantised, and not onto the weights that were never in its training (on those it is another model).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

import tuner
from tuner import recipe
from tuner.checkpoint import check_result, check_space, file_entries, publish_directory, read_manifest
from tuner.data.render import Renderer
from tuner.data.resolve import resolve_template
from tuner.data.stream import load_split
from tuner.data.templates import TEMPLATES, Template
from tuner.errors import DataError, ModelError, NonFiniteError, RunDirError, RunError, TunerError
from tuner.evaluate import read_questions
from tuner.model import quantize
from tuner.model.adapter import AdapterMeta, load_adapter, read_meta, read_peft_config, saved_keys
from tuner.model.load import (
    DTYPES,
    SCORE,
    base_fingerprint,
    find_checkpoint,
    load_base,
    load_tokenizer,
    set_padding,
    set_token_ids,
    weight_files,
)
from tuner.recipe import ModelSection
from tuner.types import Example, Message, Tokens

MARK = "tuner_merge.json"  # says that a directory is a merge of ours, so that --overwrite may replace it
NUM_PROMPTS, MAX_TOKENS = 8, 128  # compared; logits are [tokens, vocabulary] each
FP32_TOLERANCE = 1e-3  # of the largest score; rounding of another order of summation stays a hundred times below
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BUILT_IN = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Add 17 and 25.", "17 and 25 make 42."),
    ("Name three animals that live in the sea.", "Whales, dolphins and octopuses live in the sea."),
    ("Write one sentence about the moon.", "The moon rose late and lit the empty road."),
)


@dataclass(frozen=True)
class MergeReport:
    """A merge, and how closely the merged model follows the adapter on its base (both computed in fp32)."""

    output: Path
    base: str
    base_weights: str  # `as stored`, or how they were dequantised
    dtype: str  # of the merged weights
    scores: str  # what was compared: `logits`, or the `rewards` of a reward model
    max_difference: float  # of these
    agreement: float  # share of positions with the same likeliest token, or of pairs in the same order, 0 to 1
    tokens: int  # compared
    prompts: str  # which
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        rewards = self.scores == "rewards"
        head = ", the score head as float32" if rewards and self.dtype != "float32" else ""
        same = "pairs in the same order:" if rewards else "same top token at"
        return [
            f"merged onto   {self.base} ({self.base_weights}), in fp32, stored as {self.dtype}{head}",
            f"compared on   {self.tokens} tokens ({self.prompts}), the merged model loaded fresh",
            f"agreement     largest difference of {self.scores} {self.max_difference:.2e}, "
            f"{same} {100 * self.agreement:.2f}%",
            *(f"note          {warning}" for warning in self.warnings),
            f"written to    {self.output}",
        ]


def merge(
    adapter: Path,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    prompts: Sequence[Sequence[int]] | None = None,
    base: str | None = None,
) -> MergeReport:
    """Merges an adapter into its base, writes a directory for plain transformers, and compares the two.

    Args:
        adapter: a run directory, or an adapter directory.
        output: where to; by default `merged` inside the run (or inside an adapter that lies in none).
        overwrite: replace an earlier merge; anything else that is there is refused.
        dtype: of the merged weights; by default that of the base's own files.
        prompts: token ids to compare on; by default chats the run held out, else a few that are built in.
        base: where the base lies now, if not where the adapter says. It must be the same base.

    Raises:
        ModelError: no adapter there, or it does not fit the base. RunDirError: the output exists.
        SaveError: the disk refused. RunError: the merged model does not score like the adapter; nothing was written.
    """
    directory, run = find_adapter(adapter)
    target = check_target(output or (run or directory) / "merged", overwrite)
    source = _source(directory, run, base)
    weights, store = _stored(source, dtype)
    needed = weights.total() * DTYPES[store].itemsize
    check_space(target.parent, needed, "the merged model")
    tokenizer, template = _tokenizer(source)
    made_of = _made_of(source, store)
    ids, which = (prompts, "given") if prompts is not None else comparison_prompts(source.run, tokenizer, template)

    merged, expected, base_weights = _merged(source, tokenizer, ids)
    models = [merged]  # an 8B model in fp32 is 32 GB: it goes before the fresh one comes
    del merged
    report: list[MergeReport] = []

    def write(place: Path) -> None:
        lm = models.pop()
        head = lm.get_parameter(SCORE).data if source.is_reward else None
        lm.to(dtype=DTYPES[store])  # type: ignore[call-arg]  # the one cast
        if head is not None:
            lm.get_parameter(SCORE).data = head
        lm.save_pretrained(place)
        del lm
        tokenizer.save_pretrained(place)
        check_result(place, "the merged model")
        difference, agreement = compare(expected, logits(_fresh(place, source.is_reward), ids))
        what = "rewards" if source.is_reward else "logits"
        largest = max(float(e.abs().max()) for e in expected)
        if store == "float32" and difference > FP32_TOLERANCE * max(1.0, largest):
            raise RunError(
                f"the merged model does not score like the adapter ({what} differ by up to {difference:.3g}), so "
                "nothing was written; please report this with the adapter's adapter_config.json"
            )
        name, count = source.section.name_or_path, sum(map(len, ids))
        report.append(
            MergeReport(target, name, base_weights, store, what, difference, agreement, count, which, source.warnings)
        )
        mark = {"tuner": tuner.__version__} | made_of | dataclasses.asdict(report[0])
        del mark["output"]  # no paths of this machine
        mark["base"] = Path(name).name if Path(name).exists() else name
        mark["files"] = file_entries(place)
        (place / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")

    publish_directory(target, write, what="the merged model", needed_bytes=needed, replace=True)
    return report[0]


def changes(adapter: Path, output: Path, *, dtype: str | None = None) -> list[str] | None:
    """What is no longer as it was when `output` was merged, each as a clause; None: there is no merge of ours there.

    Raises:
        ModelError: no adapter there, or not its base.
    """
    try:
        mark = json.loads((output / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    directory, run = find_adapter(adapter)
    source = _source(directory, run, None)
    now = _made_of(source, _stored(source, dtype)[1])
    found = [f"{key} has changed" for key, value in now.items() if mark.get(key) != value]
    merged = file_entries(output)
    del merged[MARK]  # every file but itself
    return found + ([] if mark.get("files") == merged else ["the merged files are not what was written"])


def _made_of(source: Source, dtype: str) -> dict[str, Any]:
    """What decides a merge: two of the same are the same."""
    section = source.section
    base = source.meta.base_sha256 or base_fingerprint(section.name_or_path, section.revision)
    return {"adapter": file_entries(source.directory), "base_sha256": base, "dtype": dtype}


def _stored(source: Source, dtype: str | None) -> tuple[Counter[str], str]:
    """How many weights of each dtype the base has, and the dtype of the merged ones."""
    weights = count_weights(weight_files(find_checkpoint(source.section.name_or_path, source.section.revision).path))
    store = dtype or _NAMES.get(weights.most_common(1)[0][0], "float32")
    if store not in DTYPES:
        raise ModelError(f"--dtype: '{store}' is none of {', '.join(DTYPES)}")
    return weights, store


# --- what is merged ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An adapter, checked, and the base it belongs to."""

    directory: Path
    run: Path | None
    meta: AdapterMeta
    section: ModelSection
    warnings: tuple[str, ...]
    is_reward: bool  # it gives rewards, and has a score head of its own


def _source(directory: Path, run: Path | None, base: str | None) -> Source:
    meta, warnings = _meta(directory)
    is_reward = read_peft_config(directory).get("task_type") == "SEQ_CLS"
    return Source(directory, run, meta, meta.base_section(base, "float32"), warnings, is_reward)


def find_adapter(path: Path) -> tuple[Path, Path | None]:
    """`(adapter directory, its run directory or None)` from either of the two; the run's hashes are verified."""
    if (path / "adapter_config.json").is_file():
        directory, run = path, path.absolute().parent
    elif (path / "adapter" / "adapter_config.json").is_file():
        directory, run = path / "adapter", path
    elif (path / "model").is_dir() or (path / "config.json").is_file():
        ready = path / "model" if (path / "model").is_dir() else path
        raise ModelError(f"{path} holds full weights, so there is nothing to merge; {ready} is ready to use")
    elif read_manifest(path) is not None:
        raise ModelError(f"{path} holds no adapter yet: the run has not finished; continue it with --resume")
    else:
        raise ModelError(f"{path} is neither a run directory nor an adapter directory (no adapter_config.json)")
    manifest = read_manifest(run)
    if manifest is None:
        return directory, None
    actual = file_entries(directory)
    for name, entry in manifest.get("results", {}).get("adapter", {}).items():
        if actual.get(name) != entry:
            raise ModelError(
                f"{directory / name} is not the file that the run wrote (its sha256 differs); restore it, or copy the "
                "adapter out of the run directory if it was changed on purpose"
            )
    return directory, run


def check_target(output: Path, overwrite: bool) -> Path:
    """`output`, if a merge may be written there; changes nothing."""
    if output.is_symlink():
        raise RunDirError(f"{output} is a symbolic link; name the directory itself as --output")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise RunDirError(f"{output} exists already; pass --overwrite to replace it, or another --output")
        if not (output / MARK).is_file():
            raise RunDirError(f"{output} is not a merge of tuner's, so it is not overwritten; choose another --output")
    return output


def _meta(directory: Path) -> tuple[AdapterMeta, tuple[str, ...]]:
    """What the adapter says about itself; of one by another tool, what peft's file says, and what that leaves open."""
    config = read_peft_config(directory)
    saved_keys(directory)  # refuses a damaged file before the base is read
    meta = read_meta(directory)
    if meta is not None:
        return meta, ()
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{directory}/adapter_config.json names no base_model_name_or_path; add it")
    warning = (
        f"{directory} holds no tuner.json: whether {base} is the base it was trained on, and whether that was "
        "quantised, could not be checked"
    )
    return AdapterMeta(base, config.get("revision"), "", None, "", ()), (warning,)


def _refuse_tied(base: PreTrainedModel, directory: Path) -> None:
    """With tied embeddings a delta on one of the two would reach the other too (or, merged by peft, count twice)."""
    parts = {part for key in saved_keys(directory) for part in key.split(".")}
    touched = parts & {"embed_tokens", "lm_head"}
    if touched and base.config.tie_word_embeddings and base.get_output_embeddings() is not None:
        raise ModelError(
            f"{directory} trains {' and '.join(sorted(touched))}, which this base ties together, so no merged model "
            "scores like it; use the adapter unmerged"
        )


def count_weights(files: Sequence[Path]) -> Counter[str]:
    """How many weights of each dtype (safetensors' names: F32, BF16, ...) some safetensors files hold."""
    counts: Counter[str] = Counter()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    return counts


def _merged(
    source: Source, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]]
) -> tuple[PreTrainedModel, list[Tensor], str]:
    """`(base with the adapter merged in, scores of the adapter on its base, what base that was)`, all fp32."""
    base, base_weights = _reference_base(source.section, source.is_reward)
    _refuse_tied(base, source.directory)
    (set_padding if source.is_reward else set_token_ids)(base, tokenizer, source.meta.stop_ids)
    model = load_adapter(base, source.directory).eval()
    expected = logits(model, prompts)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{source.directory}: this adapter cannot be merged: {error}") from None
    assert isinstance(merged, PreTrainedModel)
    return merged, expected, base_weights


def _reference_base(section: ModelSection, is_reward: bool) -> tuple[PreTrainedModel, str]:
    """The base in fp32 on the CPU, as the adapter knew it, and a word on what that is."""
    if not section.load_in_4bit:
        return load_base(section, "cpu", trainable=False, reward=is_reward), "weights as stored"
    name = section.bnb_4bit_quant_type.upper()
    double = ", double quantisation" if section.bnb_4bit_use_double_quant else ""
    what = f"weights dequantised from {name}{double}: the base this QLoRA adapter was trained on"
    return dequantized_base(section, is_reward), what


def dequantized_base(section: ModelSection, is_reward: bool = False) -> PreTrainedModel:
    """The 4-bit base of `section`, quantised anew as in training and dequantised before any forward, in fp32.

    (After an evaluation forward on some CPUs bitsandbytes' packed weights no longer dequantise to themselves.)
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = section.model_copy(update={"load_in_4bit": False, "dtype": "float32"})
    quantized = load_base(section, device, trainable=False, reward=is_reward)
    plain = load_base(stored, "cpu", trainable=False, reward=is_reward)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                packed = quantize.is_4bit(module) and leaf == "weight"
                value = quantize.dequantize(module, torch.float32) if packed else parameter
                plain.get_parameter(f"{name}.{leaf}").copy_(value)
    return plain


# --- what goes with the weights ---------------------------------------------------------------------------------------


def _tokenizer(source: Source) -> tuple[PreTrainedTokenizerFast, Template | None]:
    """The tokenizer that trained, with its chat template; the base's own where none lies beside the adapter."""
    if (source.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(source.directory), None)
        return tokenizer, resolve_template("auto", tokenizer) if tokenizer.chat_template else None
    tokenizer = load_tokenizer(source.section.name_or_path, source.section.revision)
    template = TEMPLATES.get(source.meta.chat_template)
    if template is not None:
        tokenizer.chat_template = template.saved()
    return tokenizer, template


def comparison_prompts(
    run: Path | None, tokenizer: PreTrainedTokenizerFast, template: Template | None
) -> tuple[list[list[int]], str]:
    """`(token ids, where they are from)`: held-out questions or rows of the run, else chats that are built in."""
    renderer = Renderer(tokenizer, template, "assistant" if template else "all", MAX_TOKENS, "truncate")
    try:
        if run is not None and (held_out := _held_out(run, renderer)):
            return held_out, "held out by the run"
    except TunerError:
        pass  # the data has moved since; any text will do for comparing two models
    return [_ids(renderer, (Message("user", q),), a) for q, a in _BUILT_IN], "built in"


def _held_out(run: Path, renderer: Renderer) -> list[list[int]]:
    own = recipe.load(run / "recipe.yaml", find_inputs=False)
    if own.eval.questions is not None:
        return [_ids(renderer, q.messages, q.answer) for q in read_questions(own.eval.questions)[:NUM_PROMPTS]]
    if not isinstance(own.data.eval, tuple) or recipe.is_hub_id(own.data.eval[0].path):
        return []
    source = own.data.eval[0].model_copy(update={"limit": NUM_PROMPTS})
    data = own.data.model_copy(update={"max_length": MAX_TOKENS, "overlong": "truncate"})
    accepts = ("chat", "text", "preference")
    split = load_split([source], data, renderer.tokenizer, renderer.template, accepts=accepts)
    return [ids for tokens in split.tokens for ids in _documents(tokens)][:NUM_PROMPTS]


def _documents(tokens: Tokens) -> list[list[int]]:
    """The prompt with each of its answers; of a chat, all of it."""
    parts = [(*tokens.trunk, *branch) for branch in tokens.branches or ((),)]
    return [[int(i) for span in part for i in span.ids] for part in parts]


def _ids(renderer: Renderer, messages: Sequence[Message], answer: str) -> list[int]:
    """A question and its answer as ids; plain text where there is no chat template."""
    if renderer.template is None:
        text = "\n".join([*(m.content for m in messages), answer])
        return renderer.prompt_ids([Message("text", text)])[:MAX_TOKENS]
    prompt = renderer.prompt_ids(messages)
    try:
        rendered = renderer.render(Example(tuple(messages), ((Message("assistant", answer),),)))
    except DataError:  # no answer of the kind that the template is for, as Llama Guard's verdicts are
        rendered = []
    return rendered[0].ids() if rendered else prompt[:MAX_TOKENS]


# --- the comparison ---------------------------------------------------------------------------------------------------


def logits(lm: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 of each prompt, one at a time: `[tokens, vocabulary]`, or `[1]` of a reward model, which reads the end."""
    with torch.no_grad():
        return [lm(input_ids=torch.tensor([list(p)]), use_cache=False).logits[0].float() for p in prompts]


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float]:
    """`(largest difference, share of positions with the same top token)`; of rewards, share of pairs in one order."""
    difference, same = 0.0, list[bool]()
    for e, a in zip(expected, actual, strict=True):
        gap = float((e - a).abs().max())
        if not gap < float("inf"):
            raise NonFiniteError("the merged model gives scores that are not finite; nothing was written")
        difference = max(difference, gap)
        if e.ndim > 1:
            same += (e.argmax(-1) == a.argmax(-1)).tolist()
    if not same:
        pairs = itertools.combinations([(float(e), float(a)) for e, a in zip(expected, actual, strict=True)], 2)
        same = [(one[0] > other[0]) == (one[1] > other[1]) for one, other in pairs]
    return difference, sum(same) / max(1, len(same))


def _fresh(directory: Path, is_reward: bool) -> PreTrainedModel:
    """What a user of plain transformers gets, in fp32; every key of it must be there and known."""
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    lm, info = loaded
    odd = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if odd:
        raise RunError(f"the merged model does not load cleanly, so nothing was written: {odd}")
    assert isinstance(lm, PreTrainedModel)
    return lm  # from_pretrained leaves it in evaluation mode
