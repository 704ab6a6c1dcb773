"""Llama 3.1 instruct: Meta's llama-models repository, models/llama3_1/prompt_format.md, and its own template."""

from __future__ import annotations

from published._llama3 import render

__all__ = ["render"]
