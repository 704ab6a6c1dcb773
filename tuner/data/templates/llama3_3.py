"""Messages -> the Llama 3.3 instruct format (Meta's llama-models repository, models/llama3_3/prompt_format.md).

It is Llama 3.1's: Llama 3.3 instruct checkpoints carry the very template text of 3.1. So `auto` calls such a checkpoint
`llama3.1`, which renders the same; a directory saved with this template is called `llama3.3` by the title of its text.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from tuner.data.templates import llama3_1

write = functools.partial(llama3_1.write_with_title, "Llama 3.3 instruct")

# Meta's own text is that of Llama 3.1, and recognised as such
TEMPLATE = replace(llama3_1.TEMPLATE, name="llama3.3", jinja=write(), write=write, also=frozenset())
