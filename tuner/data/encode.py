"""Text -> ids that can never be control tokens, in batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer, models, normalizers
from tokenizers.models import Model

from tuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How a text begins: as a document does, as text after a control token does, without a blank of the tokenizer's own, or
# always with one, even before another blank, if it has such blanks at all (as SentencePiece itself puts them).
Lead = Literal["begin", "inner", "never", "always"]


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
        begin = _without_added(tokenizer, backend.model)
        self._ways: dict[Lead, Tokenizer] = {
            "begin": begin,
            "inner": _variant(begin, "inner"),
            "never": _variant(begin, "never"),
            "always": _variant(begin, "always"),
        }
        # Tokenizers that add no blank of their own (all of Llama 3's) have one way only.
        self._same: dict[Lead, Lead] = {
            lead: next(other for other in self._ways if self._ways[other] is self._ways[lead]) for lead in self._ways
        }
        self._short: dict[tuple[str, Lead], list[int]] = {}  # headers and the like

    def texts(self, wanted: Iterable[tuple[str, Lead]]) -> Callable[[str, Lead], list[int]]:
        """Ids of each distinct text, by how it begins; all are tokenised in one go."""
        unique = {(text, self._same[lead]) for text, lead in wanted}
        found = {key: self._short[key] for key in unique if key in self._short}
        for lead, tokenizer in self._ways.items():
            new = [text for text, way in unique if way == lead and (text, way) not in found]
            encoded = dict(zip(((text, lead) for text in new), _encode(tokenizer, new), strict=True))
            if len(self._short) < 1024:
                self._short.update((key, ids) for key, ids in encoded.items() if len(key[0]) <= 16)
            found |= encoded
        return lambda text, lead: found[text, self._same[lead]]

    def document(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that begin a document (BOS is not among them)."""
        return _encode(self._ways["begin"], texts)

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


def _variant(plain: Tokenizer, lead: Lead) -> Tokenizer:
    """`plain` with another rule about its own leading blank; `plain` itself where that makes no difference."""
    parts = Tokenizer(models.BPE())
    for name in ("normalizer", "pre_tokenizer"):
        if getattr(plain, name) is not None:
            setattr(parts, name, getattr(plain, name))
    spec = json.loads(parts.to_str())
    before = json.dumps(spec)
    if lead == "always":
        if own := _metaspace(spec["pre_tokenizer"]):  # which puts none where there is one already; Prepend does
            parts.normalizer = normalizers.Sequence(
                [*([parts.normalizer] if parts.normalizer else []), normalizers.Prepend(own)]
            )
            spec = json.loads(parts.to_str())
            spec["pre_tokenizer"] = _without_lead(spec["pre_tokenizer"], "never")
    else:
        for key in ("normalizer", "pre_tokenizer"):
            spec[key] = _without_lead(spec[key], lead)
    if json.dumps(spec) == before:
        return plain
    return _assemble(Tokenizer.from_str(json.dumps(spec)), plain.model)


def _metaspace(part: Any) -> str | None:
    """The blank that a pre-tokeniser's JSON puts before the beginning of a document, if it does."""
    if not isinstance(part, dict):
        return None
    if part["type"] == "Metaspace":
        return None if part["prepend_scheme"] == "never" else str(part["replacement"])
    return next(filter(None, map(_metaspace, part.get("pretokenizers", ()))), None)


def _without_lead(part: Any, lead: Lead) -> Any:
    """A normaliser's or pre-tokeniser's JSON without what puts a blank before a text.

    A blank that goes before the "first" text goes before the beginning of a document, and not after a control token.
    """
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            return part | {key: [inner for p in part[key] if (inner := _without_lead(p, lead)) is not None]}
    if part["type"] == "Prepend" and lead == "never":
        return None
    if part["type"] == "Metaspace" and (lead == "never" or part["prepend_scheme"] == "first"):
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and lead == "never":
        return part | {"add_prefix_space": False}
    return part


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
