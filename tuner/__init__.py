"""tuner fine-tunes and aligns Llama-family models from one YAML recipe."""

__version__ = "0.1.0"
