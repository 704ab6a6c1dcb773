"""A recipe and the starting policy -> the reference's log-probs of any batch, worked out anew or kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tuner.data import cache
from tuner.data.pack import bins, pack
from tuner.errors import ModelError
from tuner.model.adapter import adapter_scales
from tuner.model.fuse import fuse
from tuner.model.load import base_fingerprint, check_checkpoint, is_classifier, load_base, load_tokenizer
from tuner.model.policy import Policy
from tuner.model.reference import Reference
from tuner.recipe import ModelSection, Recipe
from tuner.stages.result import quantization
from tuner.train.loop import ROW_MULTIPLE
from tuner.types import Batch, Tokens, on_device

if TYPE_CHECKING:
    from tuner.stages.machine import Machine
    from tuner.stages.prepare import Data

# A batch and the samples that it was packed of -> the log-probability of each target, [M] float32.
ReferenceLogps = Callable[[Batch, Sequence[Tokens]], Tensor]


def make_reference(
    recipe: Recipe, machine: Machine, data: Data, policy: Policy, console: Console
) -> tuple[ReferenceLogps, Reference | None]:
    """The reference that a recipe asks for: the policy as it is now, or another model that never trains.

    Returns:
        Its log-probs of the data; and what scores any other text, None where kept log-probs let it leave memory.

    Raises:
        ModelError: the other model cannot be used.
    """
    section, device = recipe.reference, machine.devices.device
    if section.model == "auto":
        reference, name = Reference(policy), "the policy at its first step"
    else:
        lm = load_base(ModelSection(name_or_path=section.model, dtype=recipe.model.dtype), device, trainable=False)
        fuse(lm, policy.kernels)
        frozen = Policy(
            lm,
            compute_dtype=policy.compute_dtype,
            kernels=policy.kernels,
            attn_implementation=policy.attn_implementation,
        )
        reference, name = Reference(frozen), section.model
    copied = f", a copy of {reference.copied_bytes / 1e6:,.1f} MB" if reference.copied_bytes else ""
    console.print(f"reference {name}{copied}{', log-probs kept on disk' if section.cache else ''}")
    if not section.cache:
        return lambda batch, samples: reference(batch), reference
    stores = [data.train.tokens, *([data.held_out.tokens] if data.held_out else [])]
    capacity = recipe.train.microbatch_tokens
    assert isinstance(capacity, int)
    kept = KeptLogps(cache.directory() / "reference", _identity(recipe, reference.policy), device)
    for store in stores:
        kept.work_out(reference, store, capacity)
    kept.save()
    is_free = section.model == "auto" and not reference.copied_bytes  # the policy without its adapter
    return kept, reference if is_free else None


def check_reference(recipe: Recipe, data: Data) -> None:
    """Refuses at once another model that cannot be the reference.

    Raises:
        ModelError: there is none, it is of another kind, or it reads other tokens than the policy.
    """
    name = recipe.reference.model
    if name == "auto":
        return
    try:
        _, config = check_checkpoint(ModelSection(name_or_path=name, dtype=recipe.model.dtype))
        vocabulary = load_tokenizer(name).get_vocab()
    except ModelError as error:
        text = str(error).removeprefix("model.name_or_path: ")
        raise ModelError(f"reference.model: {text}") from None
    if is_classifier(config):
        raise ModelError(f"reference.model: {name} is a reward model, which gives no log-probs; give a causal one")
    if vocabulary != data.tokenizer.get_vocab():
        raise ModelError(f"reference.model: {name} reads other tokens than the policy; give a model of its kin")


def _identity(recipe: Recipe, policy: Policy) -> str:
    """All that decides the log-probs of a reference: weights, how they are stored and computed with, config, scales."""
    auto = recipe.reference.model == "auto"
    weights = _weights_hash(policy) if auto else base_fingerprint(recipe.reference.model)
    config = {
        k: v for k, v in policy.inner.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    quantized = quantization(recipe) if auto else None
    parts = [weights, recipe.model.dtype, quantized, config, adapter_scales(policy)]
    return json.dumps(parts, sort_keys=True, default=str)


def _weights_hash(policy: Policy) -> str:
    """sha256 over all parameters as they are now."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class KeptLogps:
    """Log-probs by what a row holds, so that neither order nor batching matters; on disk under the weights' hash."""

    def __init__(self, directory: Path, identity: str, device: torch.device) -> None:
        self.file = directory / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"
        self.device = device
        self.logps: dict[str, np.ndarray] = load_file(self.file) if self.file.is_file() else {}
        self._new = 0

    def work_out(self, reference: Reference, samples: Sequence[Tokens], capacity: int) -> None:
        """Scores what is not known yet, `capacity` tokens at a time."""
        keys = [key_of(sample) for sample in samples]
        unknown = list({key: i for i, key in enumerate(keys) if key not in self.logps}.values())
        for ids in bins([len(samples[i]) for i in unknown], capacity):
            chosen = [samples[unknown[i]] for i in ids]
            batch = pack(chosen, ROW_MULTIPLE[self.device.type]).to(self.device)
            found = reference(batch).cpu()
            documents = batch.seq_doc[batch.seq_ids].cpu()
            for place, i in enumerate(ids):
                self.logps[keys[unknown[i]]] = found[documents == place].numpy()
        self._new += len(unknown)

    def save(self) -> None:
        """Publishes the file by a rename; what another process has added meanwhile is kept too."""
        if not self._new:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self.logps = load_file(self.file) | self.logps
        temporary = self.file.with_suffix(f".{os.getpid()}.tmp")  # ranks save at the same time
        save_file(self.logps, temporary)
        temporary.replace(self.file)

    def __call__(self, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        """`[M]`: the predictions of a batch lie document by document, and in a document as they were worked out."""
        values = np.concatenate([self.logps[key_of(sample)] for sample in samples])
        return on_device(values, np.float32, self.device)


def key_of(sample: Tokens) -> str:
    """sha256 of what a sample holds: ids, where its branches begin, and what is scored."""
    digest = hashlib.sha256()
    for run in (sample.trunk, *sample.branches):
        digest.update(f"[{','.join(f'{len(s.ids)}:{s.weight if s.trained else 0.0}' for s in run)}]".encode())
        for span in run:
            digest.update(span.ids.astype("<i4").tobytes())
    return digest.hexdigest()
