"""Nested training state <-> named tensors and JSON, so that safetensors can hold it and no pickle is needed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flatten_state(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested dicts, lists and tuples of tensors, numbers, strings and None -> ({name: tensor}, JSON value).

    The JSON keeps the types of keys (an optimizer's are ints) and of sequences; anything else is a TypeError, since
    it could only be written by pickle.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(nested, "", tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "_"
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Mapping):
        items = [[_encode(k, "", {}), _encode(v, f"{path}.{k}".lstrip("."), tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{path}.{i}".lstrip("."), tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise TypeError(f"state '{path}' is a {type(value).__name__}, which JSON and safetensors cannot hold")


def unflatten_state(tensors: Mapping[str, Tensor], encoded: Any) -> Any:
    """The inverse of `flatten_state`."""
    if not isinstance(encoded, dict):
        return encoded
    ((kind, value),) = encoded.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {k: unflatten_state(tensors, v) for k, v in value}
    items = [unflatten_state(tensors, v) for v in value]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> tuple[dict[str, Tensor], Any]:
    """The global generators of torch (CPU, and the current CUDA device if in use), numpy and `random`, flattened."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy_state = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]
    return flatten_state(
        {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy_state, "python": random.getstate()}
    )


def set_rng_state(tensors: Mapping[str, Tensor], encoded: Any) -> None:
    """Sets the generators that `rng_state` read."""
    state = unflatten_state(tensors, encoded)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
