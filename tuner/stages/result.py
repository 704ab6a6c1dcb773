"""A trained policy or reward model -> what a run leaves: `adapter/` or `model/`, with its tokenizer and template."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.checkpoint import RunDir
from tuner.model.adapted import LanguageModel, is_adapted
from tuner.model.adapter import AdapterMeta, save_adapter
from tuner.model.load import SCORE, set_padding, set_token_ids
from tuner.recipe import Recipe

if TYPE_CHECKING:
    from tuner.stages.prepare import Data


def save_result(
    run: RunDir, recipe: Recipe, data: Data, lm: LanguageModel, stored_dtype: torch.dtype, base_sha256: str
) -> Path:
    """`adapter/` or `model/`, with the tokenizer and the template that trained."""
    tokenizer = data.tokenizer
    if data.template is not None:
        tokenizer.chat_template = data.template.saved()
    stop_ids = data.renderer.stop_ids
    if recipe.stage == "reward":
        set_padding(lm, tokenizer, stop_ids)

    def save(directory: Path) -> None:
        if is_adapted(lm):
            save_adapter(lm, directory, _adapter_meta(recipe, data, stop_ids, base_sha256))
        else:
            if recipe.stage != "reward":
                set_token_ids(lm, tokenizer, stop_ids)
            lm.save_pretrained(directory, state_dict=_stored(lm, stored_dtype))
            lm.config.dtype = stored_dtype  # save_pretrained has written the dtype that trained
            lm.config.save_pretrained(directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer.save_pretrained(directory)

    return run.write_result("adapter" if is_adapted(lm) else "model", save)


def _stored(lm: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict in `dtype`, score heads in fp32; tied weights stay one tensor, so that they are saved once."""
    cast: dict[int, Tensor] = {}
    state = lm.state_dict()
    for name, tensor in state.items():
        narrow = tensor.is_floating_point() and name != SCORE
        cast.setdefault(tensor.data_ptr(), tensor.to(dtype) if narrow else tensor)
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}


def quantization(recipe: Recipe) -> dict[str, Any] | None:
    """How the frozen base is quantised, as `tuner.json` keeps it."""
    model = recipe.model
    if not model.load_in_4bit:
        return None
    return {
        "type": model.bnb_4bit_quant_type,
        "double_quant": model.bnb_4bit_use_double_quant,
        "compute_dtype": model.dtype,
    }


def _adapter_meta(recipe: Recipe, data: Data, stop_ids: Sequence[int], base_sha256: str) -> AdapterMeta:
    model = recipe.model
    return AdapterMeta(
        base=model.name_or_path,
        revision=model.revision,
        base_sha256=base_sha256,
        quantization=quantization(recipe),
        chat_template=data.template.name if data.template else "none",
        stop_ids=tuple(stop_ids),
    )
