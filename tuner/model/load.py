"""Recipe -> tokenizer and base model: Hugging Face checkpoint directories and Hub ids, safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from tuner.errors import ModelError, first_line
from tuner.model import quantize
from tuner.recipe import ModelSection

FAMILIES = ("llama", "mistral")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCORE, LANGUAGE = "score.weight", "lm_head.weight"  # the head of a reward model, and of a causal one
_IGNORED = ("consolidated*", "original/*")  # the same weights once more, in another layout
_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the local disk: its directory, and the Hub commit it came from if it did."""

    path: Path
    commit: str | None = None


def find_checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """The local directory of a checkpoint; a Hub id is downloaded (or found in the cache) and pinned to its commit.

    Raises:
        ModelError: nothing is there, or the Hub cannot be reached and the cache does not hold it.
    """
    local = Path(name_or_path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"model.name_or_path: {name_or_path} holds no config.json; give a checkpoint directory")
        return Checkpoint(local)
    if local.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ModelError(f"model.name_or_path: '{name_or_path}' is neither a directory nor a Hub id (org/name)")
    if (organisation := local.parts[0]) and Path(organisation).is_dir():
        raise ModelError(
            f"model.name_or_path: '{name_or_path}' could be a Hub id, but there is a folder '{organisation}' here that "
            f"holds no '{local.parts[1]}'; mend the path, or run from another folder"
        )
    try:
        found = snapshot_download(
            name_or_path, revision=revision, allow_patterns=list(_FILES), ignore_patterns=list(_IGNORED)
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model.name_or_path: '{name_or_path}' is no local directory, it is not in the Hub cache, and the Hub "
            "cannot be reached; download it first, or give the path of a checkpoint directory"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.name_or_path: the Hub refused '{name_or_path}': {reason}") from None
    return Checkpoint(Path(found), commit=Path(found).name)


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a Llama-family checkpoint; any other architecture is refused by name."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # a file that is not what it should be makes transformers raise nearly anything
        raise ModelError(f"{checkpoint.path}/config.json cannot be read: {first_line(error)}") from None
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{checkpoint.path} is a '{config.model_type}' model; tuner trains the Llama family ({', '.join(FAMILIES)})"
        )
    return config


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint; slow ones are refused, since they can give no exact ids for spans of text."""
    path = Path(name_or_path).expanduser()
    if not (path / "tokenizer.json").is_file():  # an adapter has a tokenizer, and no checkpoint beside it
        path = find_checkpoint(name_or_path, revision).path
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(f"{path} holds no tokenizer.json; convert it to a fast tokenizer, or fetch the file again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"{path}: the tokenizer cannot be read: {first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{path}: the tokenizer has no tokenizer.json; convert it to a fast tokenizer first")
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase, avoid: Collection[int] = ()) -> int:
    """The id that fills short prompts: the tokenizer's own, Llama 3's pad token, its first reserved one, or EOS; the
    unknown token or BOS where `avoid` rules all of these out.

    Nothing ever attends to it and no loss counts it, so the vocabulary is never resized to make room for one.
    """
    known = {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items()}
    made_for_it = [known.get(name) for name in ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")]
    others = [tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    fitting = [int(i) for i in (tokenizer.pad_token_id, *made_for_it, *others) if i is not None and i not in avoid]
    return fitting[0] if fitting else 0


def set_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    """The terminators that were trained end generation, also for tools that read config.json alone."""
    generation: Any = lm.generation_config
    known = generation.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if stop_ids:
        every = list(dict.fromkeys([*stop_ids, *ends]))
        lm.config.eos_token_id = generation.eos_token_id = every if len(every) > 1 else every[0]
    pad = padding_id(tokenizer)
    if pad not in stop_ids:  # a terminator as padding would be masked away by those who train on
        tokenizer.pad_token_id = lm.config.pad_token_id = generation.pad_token_id = pad
    sampled = any(v not in (None, 1.0) for v in (generation.temperature, generation.top_p))
    if sampled and not generation.do_sample:
        generation.do_sample = True  # Llama 2 ships temperature without sampling, which transformers refuses to save


def set_padding(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    """The padding of a reward model is no terminator: transformers reads the reward at the last token that is no
    padding, and with a terminator as padding that would be the token before the end of the answer."""
    tokenizer.pad_token_id = lm.config.pad_token_id = padding_id(tokenizer, avoid=stop_ids)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` -> bf16 where the hardware computes in it natively, else fp32; a name -> that dtype."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory; the shards that an index names must all be there.

    Raises:
        ModelError: no safetensors, a shard missing, or a shard name that leaves the directory.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():  # wins over an index beside it, as in transformers
        return [single]
    if not index.is_file():
        raise ModelError(f"{path} holds no model.safetensors; tuner reads safetensors only, convert the weights first")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index} cannot be read; fetch the checkpoint again") from None
    if not names:
        raise ModelError(f"{index} names no shards; fetch the checkpoint again")
    for name in names:
        if Path(name).name != name or name == "..":
            raise ModelError(f"{index} names a shard outside its directory: '{name}'")
        if not (path / name).is_file():
            raise ModelError(f"{path}: shard {name} is missing; fetch the checkpoint again")
    return [path / name for name in names]


def base_fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """sha256 over the weight files of a checkpoint, in name order: says whether two bases are the same."""
    digest = hashlib.sha256()
    for file in weight_files(find_checkpoint(name_or_path, revision).path):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_checkpoint(model: ModelSection, *, reward: bool = False) -> tuple[Checkpoint, PretrainedConfig]:
    """Finds a checkpoint and refuses what can be refused without reading its weights, in well under a second.

    Args:
        reward: it is to give rewards: a causal checkpoint will do, or a classifier of one label.

    Raises:
        ModelError: nothing is there, not of the Llama family, a head of another kind, weights missing or truncated, or
            shapes that 4-bit blocks do not fit.
        RecipeError: 4 bits without bitsandbytes.
    """
    checkpoint = find_checkpoint(model.name_or_path, model.revision)
    config = load_config(checkpoint)
    if is_classifier(config):
        if not reward:
            raise ModelError(
                f"{checkpoint.path} is a reward model or another classifier, which writes no text; give a causal "
                "checkpoint"
            )
        if config.num_labels != 1:
            raise ModelError(
                f"{checkpoint.path} is a classifier of {config.num_labels} labels, and a reward is one number; give a "
                "causal checkpoint, or a classifier of one label"
            )
    for file in weight_files(checkpoint.path):
        _check_readable(file)
    if model.load_in_4bit:
        quantize.check_installed("model.load_in_4bit", "true")
        quantize.check_shapes(config.hidden_size, config.intermediate_size)
    return checkpoint, config


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint has a score head in the place of the language head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def load_base(
    model: ModelSection,
    device: torch.device | str,
    *,
    trainable: bool,
    param_dtype: torch.dtype = torch.float32,
    reward: bool = False,
) -> PreTrainedModel:
    """The causal language model that a recipe names, on `device`; or its classifier of one label.

    Args:
        model: the recipe's section; `load_in_4bit` quantises the linears to NF4 or FP4.
        trainable: every weight is trained, so it is stored in `param_dtype`; else it is frozen in the compute dtype.
        reward: put an fp32 score head in the place of the language head: that of the checkpoint, else one of zeros.

    Raises:
        ModelError: not of the Llama family, or weights missing, truncated or of other names than the config asks for.
    """
    device = torch.device(device)
    checkpoint, config = check_checkpoint(model, reward=reward)
    if reward:
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    compute = resolve_dtype(model.dtype, device)
    options: dict[str, Any] = {}
    if model.load_in_4bit:
        options["quantization_config"] = quantize.quantization_config(
            model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant, compute
        )
        options["device_map"] = {"": device}
    try:
        loaded: Any = auto.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=param_dtype if trainable else compute,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, OSError, ValueError, LookupError, ArithmeticError, TypeError) as error:
        raise ModelError(f"{checkpoint.path}: the weights do not fit config.json: {first_line(error)}") from None
    lm, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        heads = {SCORE, LANGUAGE} if reward and not is_classifier(config) else set()  # it lacks the one, has the other
        if keys := sorted(map(_shown_key, set(info.get(kind) or ()) - heads)):
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ModelError(f"{checkpoint.path}: {kind.replace('_', ' ')} in the weights: {shown}")
    if reward:
        lm.score = _score_head(checkpoint.path, config.hidden_size, device)
    lm.requires_grad_(trainable)
    return lm if model.load_in_4bit else lm.to(device)


def _score_head(path: Path, hidden_size: int, device: torch.device) -> nn.Linear:
    """`[1, H]`, a plain fp32 linear however the rest is stored; of zeros where the checkpoint has none.

    From zeros every reward is 0 at first: each pair starts at a loss of exactly ln 2, and no answer is ahead by the
    chance of an initialisation.
    """
    head = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            if SCORE in tensors.keys():  # noqa: SIM118  of a file that is no mapping
                head.weight.data.copy_(tensors.get_tensor(SCORE))
    return head


def _shown_key(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A name; one of another shape comes with the shape in the file and the one that config.json asks for."""
    return key if isinstance(key, str) else f"{key[0]} has {list(key[1])} instead of {list(key[2])}"


def _check_readable(file: Path) -> None:
    """A truncated or foreign file fails here, by name, before any memory is spent on the model."""
    try:
        with safe_open(file, framework="pt") as tensors:
            if not list(tensors.keys()):
                raise ModelError(f"{file} holds no tensors; fetch the checkpoint again")
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(file)
        raise ModelError(
            f"{file} ({size} bytes) is truncated or is not a safetensors file ({first_line(error)}); "
            "fetch the checkpoint again"
        ) from None
