"""A frozen base + the recipe's adapter section -> a model whose adapter trains, and back to files that peft loads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from tuner.errors import ModelError, RecipeError, first_line
from tuner.model.adapted import ADAPTER, starts_off_zero
from tuner.model.load import base_fingerprint
from tuner.recipe import AdapterSection, ModelSection
from tuner.registry import did_you_mean

META_FILE = "tuner.json"
HEADS = ("lm_head", "score")
_QUANTIZATION = {"type", "double_quant", "compute_dtype"}


@dataclass(frozen=True)
class AdapterMeta:
    """What an adapter must say about itself to be merged right: written beside it as `tuner.json`."""

    base: str
    revision: str | None
    base_sha256: str
    quantization: dict[str, Any] | None  # {"type", "double_quant", "compute_dtype"}, or None for an unquantised base
    chat_template: str
    stop_ids: tuple[int, ...]

    def base_section(self, moved_to: str | None = None, dtype: Literal["auto", "float32"] = "auto") -> ModelSection:
        """How to load the base as it was trained on: in `dtype`, or in what it was quantised from.

        Raises:
            ModelError: the base is not where it was, nor at `moved_to`, or has other weights.
        """
        name, revision = (moved_to, None) if moved_to else (self.base, self.revision)
        try:
            found = base_fingerprint(name, revision) if self.base_sha256 else ""
        except ModelError as error:
            raise ModelError(f"the adapter's base cannot be used ({error}); say where it is with --base") from None
        if found != self.base_sha256:
            raise ModelError(
                f"the adapter was trained on another base: {name} has sha256 {found[:12]}..., the adapter's base had "
                f"{self.base_sha256[:12]}...; give the right one with --base"
            )
        if self.quantization is None:
            return ModelSection(name_or_path=name, revision=revision, dtype=dtype)
        return ModelSection(
            name_or_path=name,
            revision=revision,
            dtype=str(self.quantization["compute_dtype"]).removeprefix("torch."),  # type: ignore[arg-type]
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantization["type"],
            bnb_4bit_use_double_quant=self.quantization["double_quant"],
        )


def attach(base: PreTrainedModel, section: AdapterSection) -> PeftModel:
    """Wraps a frozen base with the adapter of the recipe; trainable parameters are stored in fp32.

    On the base of a reward model the score head trains beside the adapter, and an adapter of a causal model can be gone
    on with: all of it but its language head, if it trained one, comes along.

    Raises:
        RecipeError: a target that matches no module, or one that cannot be adapted.
    """
    if section.path:
        directory = adapter_directory(Path(section.path))
        new_score = task_of(base) == "SEQ_CLS" != read_peft_config(directory).get("task_type")
        model = load_adapter(base, directory, trainable=True, new_score=new_score)
    else:
        targets = resolve_targets(base, section.target_modules)
        _check_saved_modules(base, section.modules_to_save)
        config = LoraConfig(
            r=section.r,
            lora_alpha=section.lora_alpha,
            lora_dropout=section.lora_dropout,
            target_modules=targets,
            modules_to_save=list(section.modules_to_save) or None,
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
            init_lora_weights=section.init_lora_weights,
            task_type=task_of(base),
        )
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if starts_off_zero(model):
        _keep_start(model)
    return model


def adapter_directory(path: Path) -> Path:
    """The adapter directory that `path` means: itself, or the `adapter/` of a run."""
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def check_continues(path: Path, base_sha256: str, quantization: Mapping[str, Any] | None) -> None:
    """Refuses to go on training an adapter on another base, or on the same base quantised otherwise.

    Raises:
        ModelError: names what differs. An adapter of another tool, without `tuner.json`, passes.
    """
    meta = read_meta(adapter_directory(path))
    if meta is None:
        return
    if meta.base_sha256 != base_sha256:
        raise ModelError(
            f"adapter.path: {path} was trained on another base ({meta.base}, weights {meta.base_sha256[:12]}) than "
            f"model.name_or_path (weights {base_sha256[:12]}); give that base"
        )
    if meta.quantization != quantization:
        raise ModelError(
            f"adapter.path: {path} was trained on a base with quantization {meta.quantization or 'none'}, and this "
            f"recipe asks for {quantization or 'none'}; set model.load_in_4bit and model.bnb_4bit_* as they were"
        )


def task_of(base: PreTrainedModel) -> str:
    """What peft calls the task of a model; with `SEQ_CLS` it trains and saves the score head too."""
    return "SEQ_CLS" if isinstance(base, GenericForSequenceClassification) else "CAUSAL_LM"


def adapter_scales(model: nn.Module) -> dict[str, dict[str, float]]:
    """Module -> adapter -> by what its update BA is multiplied; empty without an adapter."""
    return {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, lora.layer.LoraLayer)}


def resolve_targets(base: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Names of the linears to adapt; `all-linear` is every linear but the heads.

    Raises:
        RecipeError: a name that matches no linear (with the nearest one), or the head.
    """
    linears = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {*HEADS}
    if targets == "all-linear":
        return sorted(linears)
    names = [targets] if isinstance(targets, str) else list(targets)
    every = {n for n, _ in base.named_modules() if n}
    for name in names:
        if (leaf := name.rpartition(".")[2]) in HEADS:
            remedy = "put it in modules_to_save" if leaf == "lm_head" else "it is trained in full; leave it out"
            raise RecipeError(f"adapter.target_modules: LoRA on {leaf} is not supported; {remedy}")
        if name.rpartition(".")[2] not in linears or not any(n == name or n.endswith("." + name) for n in every):
            hint = did_you_mean(name, linears)
            raise RecipeError(
                f"adapter.target_modules: '{name}' matches no linear of this model{hint}; known: "
                f"{', '.join(sorted(linears))}, or all-linear"
            )
    return names


def _check_saved_modules(base: PreTrainedModel, names: Iterable[str]) -> None:
    leaves = {n.rpartition(".")[2] for n, _ in base.named_modules() if n}
    for name in names:
        if name not in leaves:
            hint = did_you_mean(name, leaves)
            raise RecipeError(f"adapter.modules_to_save: '{name}' matches no module of this model{hint}")
        if name in ("embed_tokens", "lm_head") and base.get_output_embeddings() and base.config.tie_word_embeddings:
            raise RecipeError(
                f"adapter.modules_to_save: '{name}' is tied to the other embedding in this checkpoint: a trained copy "
                "would come apart from it; use full fine-tuning, or leave it frozen"
            )


def matched_modules(model: PeftModel) -> dict[str, int]:
    """How many linears of each name carry an adapter, for the manifest."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, lora.layer.LoraLayer):
            leaf = name.rpartition(".")[2]
            counts[leaf] = counts.get(leaf, 0) + 1
    return dict(sorted(counts.items()))


def _keep_start(model: PeftModel) -> None:
    """Remembers A and B at the start, which the base lacks: the result is saved relative to the untouched base."""
    for module in model.modules():
        if isinstance(module, lora.layer.LoraLayer) and ADAPTER in module.lora_A:
            for matrix in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
                matrix.register_buffer("start", matrix.weight.detach().clone(), persistent=False)


def adapter_tensors(model: PeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter as peft's own state dict and config, so that it fits the *untouched* base.

    PiSSA trains W0 - s B0 A0 + s B A, so relative to W0 the change is s [B, -B0] [A; A0]: plain LoRA of twice the rank.
    """
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    config: LoraConfig = LoraConfig(**_config_fields(model))
    config.inference_mode = True
    if config.modules_to_save:  # peft adds the heads of classifiers to them each time that an adapter is loaded
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    if starts_off_zero(model):
        modules = {n: m for n, m in model.named_modules() if isinstance(m, lora.layer.LoraLayer)}
        for name, module in modules.items():
            a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
            state[f"{name}.lora_A.weight"] = torch.cat([a.weight, a.get_buffer("start")], dim=0)
            state[f"{name}.lora_B.weight"] = torch.cat([b.weight, -b.get_buffer("start")], dim=1)
        factor = math.sqrt(2) if config.use_rslora else 2  # keeps the scaling alpha/r, or alpha/sqrt(r)
        config.lora_alpha, config.r, config.init_lora_weights = config.lora_alpha * factor, 2 * config.r, True
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}, config


def _config_fields(model: PeftModel) -> dict[str, Any]:
    config = model.peft_config[ADAPTER].to_dict()
    config["base_model_name_or_path"] = model.get_base_model().config.name_or_path
    known = LoraConfig.__dataclass_fields__
    return {k: v for k, v in config.items() if k in known and known[k].init}


def save_adapter(model: PeftModel, directory: Path, meta: AdapterMeta) -> None:
    """Writes `adapter_model.safetensors`, `adapter_config.json` and `tuner.json`; plain peft loads the first two."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors, config = adapter_tensors(model)
    config.base_model_name_or_path = meta.base
    config.revision = meta.revision
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    (directory / META_FILE).write_text(json.dumps(asdict(meta), indent=2) + "\n")


def read_meta(directory: Path) -> AdapterMeta | None:
    """What `tuner.json` says beside an adapter, or None for an adapter that another tool wrote."""
    file = directory / META_FILE
    if not file.is_file():
        return None
    try:
        fields: Mapping[str, Any] = json.loads(file.read_text())
        meta = AdapterMeta(**{**fields, "stop_ids": tuple(fields["stop_ids"])})
        whole = all(isinstance(text, str) for text in (meta.base, meta.base_sha256, meta.chat_template))
        if not whole or not (meta.quantization is None or _QUANTIZATION <= meta.quantization.keys()):
            raise ValueError
        return meta
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{file} cannot be read; the adapter directory is damaged") from None


def _as_it_is(base: PreTrainedModel, directory: Path, trainable: bool) -> tuple[PeftModel, set[str]]:
    """The adapter on its base, and the names of the tensors that it brings."""
    if (task := read_peft_config(directory).get("task_type")) != (wanted := task_of(base)):
        if task == "SEQ_CLS":
            raise ModelError(f"{directory} is the adapter of a reward model, which writes no text; give another one")
        if wanted == "SEQ_CLS":
            raise ModelError(f"{directory} is no adapter of a reward model: it has no score head; give another one")
    model = PeftModel.from_pretrained(base, str(directory), adapter_name=ADAPTER, is_trainable=trainable)
    return model, set(saved_keys(directory))


def _with_score(base: PreTrainedModel, directory: Path, trainable: bool) -> tuple[PeftModel, set[str]]:
    """The adapter of a causal model on the base of a reward model, and the names of its tensors.

    It keeps the score head of that base, and leaves the language head behind if it trained one.
    """
    config = LoraConfig.from_pretrained(str(directory))
    config.task_type, config.inference_mode = "SEQ_CLS", not trainable
    config.base_model_name_or_path = None  # peft warns where it is another one
    config.modules_to_save = [name for name in config.modules_to_save or () if name != "lm_head"]
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".lm_head.weight")}
    tensors["base_model.model.score.weight"] = base.get_parameter("score.weight").detach().clone()
    model = get_peft_model(base, config, adapter_name=ADAPTER)
    set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)
    return model, set(tensors)


def load_adapter(
    base: PreTrainedModel, directory: Path, *, trainable: bool = False, new_score: bool = False
) -> PeftModel:
    """Puts a saved adapter on a base; a key that is missing, unexpected or of another shape is an error.

    Args:
        new_score: it is an adapter of a causal model, and goes on as that of a reward model.

    Raises:
        ModelError: no adapter there, a damaged file, or an adapter that does not fit this base.
    """
    check_files(directory)
    try:
        model, found = (_with_score if new_score else _as_it_is)(base, directory, trainable)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{directory}/adapter_model.safetensors cannot be read: {first_line(error)}") from None
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter {directory} does not fit this base: {first_line(error)}") from None
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))
    if expected != found:
        odd = sorted(expected ^ found)[0]
        raise ModelError(f"the adapter {directory} does not fit this base: '{odd}' is in only one of the two")
    return model


def check_files(directory: Path) -> set[str]:
    """The names of the tensors in an adapter directory. ModelError: it is none, or one of its files is damaged."""
    read_peft_config(directory)
    read_meta(directory)
    return set(saved_keys(directory))


def read_peft_config(directory: Path) -> dict[str, Any]:
    """peft's `adapter_config.json` of a LoRA adapter. ModelError: there is none, it is damaged, or of another kind."""
    file = directory / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except FileNotFoundError:
        raise ModelError(f"{directory} holds no adapter_config.json; give an adapter directory") from None
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{file} cannot be read; the adapter directory is damaged") from None
    if kind != "LORA":
        raise ModelError(f"{directory} is a {kind} adapter; tuner knows LoRA and its kin only")
    return dict(config)


def saved_keys(directory: Path) -> list[str]:
    """The names of the tensors of a saved adapter. ModelError: there are none, or the file is damaged."""
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{directory} holds no adapter_model.safetensors; tuner reads safetensors only")
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}; the adapter directory is damaged") from None


def check_trained_tokens(model: nn.Module, ids: Mapping[int, str], *, trained: bool) -> None:
    """Refuses control tokens that pretraining never touched where the embeddings stay frozen.

    A row of zeros, or rows equal to each other, can be neither read nor emitted by an adapter on the linears.

    Raises:
        ModelError: names the tokens and the remedy.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if trained:
        return
    rows = weight[list(ids)].detach().float()
    norms = rows.norm(dim=1)
    typical = weight[: min(4096, weight.shape[0])].detach().float().norm(dim=1).median()
    dead = [name for name, norm in zip(ids.values(), norms, strict=True) if norm < 1e-3 * typical]
    same = (torch.cdist(rows, rows) + torch.eye(len(rows), device=rows.device) * typical) < 1e-3 * typical
    dead += [name for name, twin in zip(ids.values(), same.any(dim=1), strict=True) if twin and name not in dead]
    if dead:
        modules = "embed_tokens, lm_head" if model.get_output_embeddings() else "embed_tokens"  # type: ignore[operator]
        raise ModelError(
            f"the embeddings of {', '.join(dead)} were never trained in this base (rows of zeros, or equal to each "
            f"other) and would stay frozen; add adapter.modules_to_save: [{modules}], fine-tune the full "
            "weights, or use a data.chat_template whose control tokens the base knows"
        )
