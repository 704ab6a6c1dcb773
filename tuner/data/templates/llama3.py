"""Messages -> the Llama 3 instruct format (published in Meta's Llama 3 model card and the checkpoint's own template).

<|begin_of_text|><|start_header_id|>user<|end_header_id|>

Hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Hi<|eot_id|>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.templates import BOS, Piece, Template
from tuner.data.templates._llama3 import END, EOT, START, answer, header, turn
from tuner.types import Message

JINJA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def pieces(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Piece]:
    """Blanks around a content are trimmed, as Meta's template does."""
    out = [Piece(BOS, control=True)]
    for i, message in enumerate(messages):
        content = message.content.strip()
        out += answer(i, content) if message.role == "assistant" else turn(message.role, i, content)
    return out + (header("assistant") if add_generation_prompt else [])


TEMPLATE = Template(
    name="llama3",
    jinja=JINJA,
    control=(BOS, START, END, EOT),
    terminators=(EOT,),
    roles=("system", "user", "assistant"),
    pieces=pieces,
    # Meta's own texts in the Llama 3 checkpoints: the present one, and the first, which always ended in a header
    also=frozenset(
        {
            "412eb5bf39199a0995a17c78eeb10d149ac623ee06a6efc14bfb487e85b4ca07",
            "364ec875ef3243578400a1ac7f6511ad66cb3a32de42658dd156639fe8fbb856",
        }
    ),
)
