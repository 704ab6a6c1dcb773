"""Llama 3.3 instruct: Meta's llama-models repository, models/llama3_3/prompt_format.md; the same as Llama 3.1's."""

from __future__ import annotations

from published._llama3 import render

__all__ = ["render"]
