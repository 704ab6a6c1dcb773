"""Hand-marked golden texts -> their ids and masks: `python tests/golden/regenerate.py` rewrites the JSON files here.

A golden chat states its text with «» around what is trained; that is written by hand, from the published format. The
ids come from the tokenizer alone, one call for each marked or unmarked stretch, and never from tuner's renderer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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


def fill(tokenizer: Tokenizer, chat: dict[str, Any]) -> None:
    """Sets `ids` and `mask` of a golden chat from its marked text."""
    ids: list[int] = []
    mask: list[int] = []
    for part in re.findall(r"«.*?»|[^«»]+", chat["text"], flags=re.DOTALL):
        new = tokenizer.encode(part.strip("«»"), add_special_tokens=False).ids
        ids += new
        mask += [int(part.startswith("«"))] * len(new)
    chat |= {"ids": ids, "mask": mask}


def main() -> None:
    tokenizer = build_tokenizer()
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    for path in sorted(HERE.glob("chats_*.json")):
        chats = json.loads(path.read_text(encoding="utf-8"))
        for chat in chats:
            fill(tokenizer, chat)
        lines = (json.dumps(chat, ensure_ascii=False) for chat in chats)
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
