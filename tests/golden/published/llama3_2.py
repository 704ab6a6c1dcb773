"""Llama 3.2 instruct: Meta's llama-models repository, models/llama3_2/text_prompt_format.md; a pinned date."""

from __future__ import annotations

from published._llama3 import render

__all__ = ["render"]
