"""Text -> ids that can never be control tokens, in batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Model

from tuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextEncoder:
    """Tokenises with the model, normaliser and pre-tokeniser of a fast tokenizer, but without its added tokens.

    Added tokens are found by searching the text, special and ordinary ones alike, before the model sees it; a tokenizer
    without them knows no control token, so whatever a text spells stays text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no fast version (tokenizer.json), which exact ids "
                "need; convert it with transformers, or use a checkpoint that has one"
            )
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._plain = _without_added(tokenizer, backend.model)
        self._inner = self._plain
        scheme = getattr(backend.pre_tokenizer, "prepend_scheme", None)  # of SentencePiece-like tokenizers only
        if scheme == "first":  # a blank goes before a text only at the start of a document, never after a control token
            self._inner = Tokenizer(self._plain.model)
            if backend.normalizer is not None:
                self._inner.normalizer = backend.normalizer
            pre = backend.pre_tokenizer
            self._inner.pre_tokenizer = pre_tokenizers.Metaspace(
                pre.replacement, prepend_scheme="never", split=pre.split
            )
        self._short: dict[str, list[int]] = {"": []}  # headers and the like

    def inner(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each distinct text as it stands after a control token."""
        unique = set(texts)
        new = [t for t in unique if t not in self._short]
        found = dict(zip(new, _encode(self._inner, new), strict=True))
        if len(self._short) < 1024:
            self._short.update((t, ids) for t, ids in found.items() if len(t) <= 16)
        return {t: found[t] if t in found else self._short[t] for t in unique}

    def document(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that begin a document (BOS is not among them)."""
        return _encode(self._plain, texts)

    def parsed(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts whose control tokens are parsed: for text that a trusted tool has templated."""
        return _encode(self._parsing, texts)

    @cached_property
    def _parsing(self) -> Tokenizer:
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        return backend


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # the fast variant skips offsets, which nothing here needs
    return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_added(tokenizer: PreTrainedTokenizerFast, model: Model) -> Tokenizer:
    """The backend without added tokens, shown to be unable to write a special token from its text."""
    backend = tokenizer.backend_tokenizer
    plain = _assemble(backend, model)
    if _reachable(plain, tokenizer):
        # the model's own vocabulary holds them, and takes a whole word from there: build a model without them
        plain = Tokenizer.from_str(_without_words(backend.to_str(), tokenizer))
    if leaks := _reachable(plain, tokenizer):
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} turns the text {leaks[0]!r} into a control token even with "
            "added tokens removed, so text could forge it; use a checkpoint whose control tokens are added tokens"
        )
    return plain


def _assemble(backend: Tokenizer, model: Model) -> Tokenizer:
    plain = Tokenizer(model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _reachable(plain: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Special tokens whose text alone still yields their id."""
    special = {
        i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special and i != tokenizer.unk_token_id
    }
    found = _encode(plain, list(special.values()))
    return [text for (i, text), ids in zip(special.items(), found, strict=True) if i in ids]


def _without_words(backend: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A tokenizer's JSON without added tokens, also in the model's vocabulary unless a merge builds them."""
    spec = json.loads(backend)
    spec |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        merges = (m.split(" ") if isinstance(m, str) else m for m in spec["model"].get("merges", []))
        needed = {word for left, right in merges for word in (left, right, left + right)}
        needed.add(spec["model"].get("unk_token") or "")
        for token in tokenizer.added_tokens_decoder.values():
            if len(token.content) > 1 and token.content not in needed:
                vocab.pop(token.content, None)
    return json.dumps(spec)
