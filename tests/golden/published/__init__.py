"""One file here renders one template from its published description alone, to hold tuner's rendering against.

`render(row)` turns a row of `conversations.py` into text with «» around what is trained: answers and their terminators.
BOS and EOS are spelled as the golden tokenizer spells them. None: the template has no place for such a conversation.
Nothing here imports tuner.
"""

from __future__ import annotations

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
