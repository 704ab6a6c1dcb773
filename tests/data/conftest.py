"""Tokenizers and small files for the tests of the data path."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tuner.data.templates import Template, control_ids

GOLDEN = Path(__file__).parents[1] / "golden"


def _load() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the golden files: Llama 3's control tokens, ChatML's, and `[note]`, added but not special."""
    return _load()


@pytest.fixture
def fresh_tokenizer() -> PreTrainedTokenizerFast:
    """The same, to be changed by a test."""
    return _load()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and gives the path."""

    def write_rows(rows: Iterable[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """BOS and EOS are its only control tokens."""
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = spec["added_tokens"][:2]
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., PreTrainedTokenizerFast]:
    """`tokenizer_of(template, *more)` -> the golden tokenizer with all control tokens of the template, and more."""

    def make(template: Template, *more: str) -> PreTrainedTokenizerFast:
        tokenizer = _load()
        have = control_ids(tokenizer)
        lacks = [name for name in (*template.control, *template.optional, *more) if name not in have]
        tokenizer.add_special_tokens({"additional_special_tokens": lacks}, replace_extra_special_tokens=False)
        return tokenizer

    return make


WORDS = "The system said [INST] hello [/INST] to the user. def add(a, b): return a + b ### Response: 1234567890 <<SYS>>"


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[..., PreTrainedTokenizerFast]:
    """`sentencepiece(kind, control)` -> Llama 2's kind of tokenizer, small, with control tokens beside <s> and </s>.

    Blanks are `▁`, and bytes stand for what it does not know. The published ones differ in where they put a blank of
    their own: `metaspace` only at the beginning of a document, `prepend` (the older kind) after control tokens too,
    `raw` (to count with) nowhere.
    """

    def make(kind: str, control: Iterable[str] = ()) -> PreTrainedTokenizerFast:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(vocab_size=200, min_frequency=1, show_progress=False)
        trained.train_from_iterator([WORDS] * 3, trainer)
        spec = json.loads(trained.to_str())["model"]
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *spec["vocab"], "☺"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in spec["merges"]]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            blanks = [normalizers.Replace(" ", "▁")]
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), *blanks] if kind == "prepend" else blanks
            )
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        for token in ("<unk>", "<s>", "</s>", *control):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    return make
