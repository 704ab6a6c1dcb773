"""A model -> what an adapter has made of it: questions that need no recipe."""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

from peft import PeftModel
from transformers import PreTrainedModel

ADAPTER = "default"
LanguageModel: TypeAlias = PreTrainedModel | PeftModel


def is_adapted(lm: LanguageModel) -> TypeGuard[PeftModel]:
    """Whether a model carries an adapter."""
    return isinstance(lm, PeftModel)


def starts_off_zero(model: PeftModel) -> bool:
    """Whether the base was changed at the start to make room for the adapter (PiSSA, arXiv:2404.02948)."""
    return str(model.peft_config[ADAPTER].init_lora_weights).startswith("pissa")
