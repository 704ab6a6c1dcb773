"""Conversations -> golden texts, ids and trained runs: `python tests/golden/regenerate.py [TEMPLATE ...]` writes them.

The text of a golden chat has «» around what is trained. It comes from `published/<template>.py`, which renders the
conversations from the published format alone, or was marked by hand (`marked_by_hand.json`, for other masking policies
and for messages that say themselves whether they are trained). The ids come from the tokenizer, one call for each
marked or unmarked stretch. Nothing here imports tuner.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS, EXTRA
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|python_tag|>", "<|finetune_right_pad_id|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(16)),
]
SENTENCES = [
    "The system said hello to the user, and the assistant said hello to the system.\n\n",
    "What is the capital of France? The capital of France is Paris.\n",
    "Please answer the question in one word. I would rather answer in two words, thank you.\n\n",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 345))\n",
    "In 1984 there were 12,345 cats in the house; 2 + 2 = 4, and 7 x 8 = 56.\n",
]


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE like Llama 3's, with its control tokens, ChatML's, and one added token that is not special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(["[note]"])
    return tokenizer


def templates() -> list[str]:
    """The templates that have a reference, e.g. `llama3.1` for `published/llama3_1.py`."""
    stems = sorted(path.stem for path in (HERE / "published").glob("*.py") if not path.stem.startswith("_"))
    return [re.sub(r"(?<=\d)_(?=\d)", ".", stem) for stem in stems]


def reference(template: str) -> Callable[[dict[str, Any]], str | None]:
    """`render` of the template's reference: a row -> its marked text, or None."""
    return importlib.import_module(f"published.{template.replace('.', '_')}").render


def tokenizer_of(template: str) -> Tokenizer:
    """The golden tokenizer with the control tokens that the template's own tokenizer has beside (`CONTROL`)."""
    tokenizer = build_tokenizer()
    module = importlib.import_module(f"published.{template.replace('.', '_')}")
    tokenizer.add_special_tokens(list(getattr(module, "CONTROL", ())))
    return tokenizer


def rows(template: str) -> list[dict[str, Any]]:
    """The conversations that the template's golden file renders; names are unique."""
    return [*CONVERSATIONS, *EXTRA.get(template, [])]


def encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[list[int]]]:
    """Ids of a marked text, and where in them each trained run begins and ends."""
    ids: list[int] = []
    trained: list[list[int]] = []
    for part in re.findall(r"«.*?»|[^«»]+", text, flags=re.DOTALL):
        new = tokenizer.encode(part.strip("«»"), add_special_tokens=False).ids
        if part.startswith("«") and trained and trained[-1][1] == len(ids):
            trained[-1][1] += len(new)
        elif part.startswith("«"):
            trained.append([len(ids), len(ids) + len(new)])
        ids += new
    return ids, trained


def golden(tokenizer: Tokenizer, chat: dict[str, Any]) -> dict[str, Any]:
    """A golden chat with `ids` and `trained`, unless the template has no place for it (`text` is null)."""
    if chat["text"] is None:
        return chat
    return chat | dict(zip(("ids", "trained"), encode(tokenizer, chat["text"]), strict=True))


def main(names: list[str]) -> None:
    build_tokenizer().save(str(HERE / "tokenizer.json"), pretty=False)
    by_hand = json.loads((HERE / "marked_by_hand.json").read_text(encoding="utf-8"))
    for name in names or templates():
        tokenizer, render = tokenizer_of(name), reference(name)
        chats = [{"name": row["name"], "text": render(row)} for row in rows(name)] + by_hand.get(name, [])
        lines = (
            json.dumps(golden(tokenizer, chat), ensure_ascii=False, separators=(",", ":")).replace("\u2028", "\\u2028")
            for chat in chats
        )
        path = HERE / f"chats_{name.replace('.', '_')}.json"
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
