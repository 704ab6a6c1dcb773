"""A tokenizer -> the most characters of a text that one token can stand for: so many characters are at least so many
tokens, which tells of a huge row that it is too long without tokenising it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def longest_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The length of the longest word of the vocabulary, in characters; None where a token may stand for more.

    A word of a byte-level vocabulary has a character for each byte, so it stands for at most that many characters. No
    bound holds where a normaliser or pre-tokeniser may shorten the text, or where what the vocabulary lacks becomes
    one unknown token however long it is, or none.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, vocab = spec["model"], spec["model"].get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not vocab:
        return None
    keeps = all(map(_keeps, _parts(spec["normalizer"]))) and all(map(_keeps, _parts(spec["pre_tokenizer"])))
    return max(map(len, vocab)) if keeps and _complete(spec, model, vocab) else None


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokeniser."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for p in inner for step in _parts(p)] if inner else [part]


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step leaves every character in the text, itself or as another one."""
    match step["type"]:
        case "ByteLevel" | "Metaspace" | "Digits" | "Prepend":
            return True
        case "Split":
            return step["behavior"] != "Removed"
        case "Replace":
            pattern = step["pattern"].get("String")
            return pattern is not None and len(pattern) == 1 <= len(step["content"])
    return False


def _complete(spec: dict[str, Any], model: dict[str, Any], vocab: dict[str, int]) -> bool:
    """Whether no character is lost, and none hides with others behind one unknown token."""
    if any(step["type"] == "ByteLevel" for step in _parts(spec["pre_tokenizer"])):
        return set(pre_tokenizers.ByteLevel.alphabet()) <= vocab.keys()
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return model.get("unk_token") is not None and not model.get("fuse_unk")
