"""Tokenizers and small files for the tests of the data path."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

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
