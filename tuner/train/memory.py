"""A model's config, a recipe and a device -> the bytes that training takes, and the largest microbatch that fits.

The estimate is arithmetic on shapes, and the device counts with its *total* memory: what happens to be free at a start
would give another run the next time. What a token costs is what the fused modules keep for the backward (`_layer`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from tuner.errors import ModelError, RecipeError
from tuner.kernels.token_logps.reference import ROW_MULTIPLE, rows_at_once
from tuner.model.adapter import adapter_directory, read_peft_config
from tuner.model.load import find_checkpoint, load_config, resolve_dtype
from tuner.recipe import AdapterSection, Recipe
from tuner.train.setup import Devices

# Most tokens at once. A GPU's matmuls are at their best rate from about 8k rows on, so that a larger microbatch saves
# launches and nothing else; and up to this one no tensor has 2^31 numbers, which offsets in kernels must not reach. On
# a CPU more than this leaves the caches.
MOST_TOKENS = {"cuda": 32_768, "cpu": 4_096}
# Of the total memory. On a GPU the rest is for its context, for libraries, for what fragments, and for the error of the
# estimate; on a CPU also for the data, for the system and for other programs.
SHARE = {"cuda": 0.85, "cpu": 0.5}
MULTIPLE = 1_024  # tokens; sizes are rounded down to one of it, or of ROW_MULTIPLE below it
STATE_BYTES = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "paged_adamw_32bit": 8.0}  # a parameter; else 2 like itself
NF4_SCALES = {True: (8 + 32 / 256) / 8 / 64, False: 4 / 64}  # bytes a weight; one of 8 bits, or of fp32, for 64 weights
BATCH_BYTES = 88  # a token: its ids, positions, document, branch, target, weight and sequence


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama-family model."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    query: int  # heads x their dimension
    keys: int  # key heads x their dimension
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # of transformers' config, by version
        return cls(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            query=heads * dim,
            keys=config.num_key_value_heads * dim,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear of a layer, by its name."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def in_linears(self) -> int:
        """Weights in the linears of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def in_table(self) -> int:
        """Weights of the embeddings, and of a head that is not tied to them."""
        return self.vocabulary * self.hidden

    def beside(self, reward: bool) -> int:
        """Weights that are in no layer's linears: embeddings, head and norms."""
        head = self.hidden if reward else 0 if self.tied else self.in_table
        return self.in_table + head + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run takes whatever its microbatch, by what they are, and bytes of each token of it."""

    fixed: Mapping[str, float]
    token: float
    paged: float = 0.0  # of the fixed ones; they leave the device when it needs the room

    @property
    def total_fixed(self) -> float:
        return sum(self.fixed.values())


@dataclass(frozen=True)
class Choice:
    """Tokens that run at once, and why so many."""

    tokens: int
    why: str


def microbatch(recipe: Recipe, devices: Devices) -> Choice:
    """How many tokens run at once: as the recipe says, or the most that fit the device of every rank.

    Raises:
        ModelError: the checkpoint has no config that can be read.
        RecipeError: none fit.
    """
    if isinstance(recipe.train.microbatch_tokens, int):
        return Choice(recipe.train.microbatch_tokens, "as the recipe says")
    device, model = devices.device, recipe.model
    config, reference = load_config(find_checkpoint(model.name_or_path, model.revision)), None
    if recipe.stage == "dpo" and recipe.reference.model != "auto":
        with suppress(ModelError):  # which is refused elsewhere, under its own name
            reference = load_config(find_checkpoint(recipe.reference.model))
    footprint = training(recipe, config, resolve_dtype(model.dtype, device), device.type, reference)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", devices.world_size)) if device.type == "cpu" else 1
    longest = min(recipe.data.max_length, config.max_position_embeddings)  # beyond its positions a row is refused
    choice, error = None, None
    try:
        choice = largest(footprint, total_memory(device) / sharing, device.type, longest)
    except RecipeError as found:
        error = found
    fewest = -devices.agree(-choice.tokens if choice else 0)  # before anyone gives up, so that no rank waits for it
    if error is not None:
        raise error
    if choice is None or not fewest:
        raise RecipeError("train.microbatch_tokens: auto finds none that fits the device of another rank")
    return replace(choice, tokens=fewest)


def training(
    recipe: Recipe, config: PretrainedConfig, compute: torch.dtype, kind: str, reference: PretrainedConfig | None = None
) -> Footprint:
    """What a training run takes.

    Args:
        compute: the dtype of matmuls. kind: of the device, `cuda` or `cpu`.
        reference: the config of another model that is loaded as the reference.
    """
    shape, c = Shape.of(config), compute.itemsize
    model, train, adapter = recipe.model, recipe.train, _as_saved(recipe.adapter)
    reward = recipe.stage == "reward"
    beside = shape.beside(reward)
    everything = shape.in_linears + beside
    stored = 2 if adapter is None and train.param_dtype == "bfloat16" else 4  # of what trains
    casts = adapter is None and stored > c  # autocast keeps a copy of each matrix through a microbatch
    trained = everything if adapter is None else _in_adapter(shape, adapter, reward)
    head_trains = adapter is None or "lm_head" in adapter.modules_to_save
    if adapter is None:
        weights = float(everything * stored + (shape.in_linears * c if casts else 0))
    elif model.load_in_4bit:
        weights = shape.in_linears * (0.5 + NF4_SCALES[model.bnb_4bit_use_double_quant]) + beside * c
        weights += shape.hidden * shape.inner * c  # the buffer in which the widest is multiplied with
    else:
        weights = everything * c
    state = trained * STATE_BYTES.get(train.optim, 2.0 * stored)
    fixed = {
        "weights": weights + (trained * stored if adapter is not None else 0),
        "gradients": trained * stored,
        "optimizer": state,
        "head": 0.0 if reward else _head(shape, c, kind, trains=head_trains),
    }
    if recipe.stage == "dpo":
        fixed["reference"] = _reference(adapter, trained * stored, reference, c)
    wide = casts or (adapter is not None and bool(adapter.modules_to_save) and c < 4)  # fp32 between its parts
    layer = partial(_layer, shape, c, stream=4 if wide else c, casts=wide, adapter=adapter)
    inputs = shape.hidden * (4 if wide else c)
    of_layer = {False: layer(), "selective": layer(selective=True), True: float(inputs)}
    held = shape.layers * of_layer[train.activation_checkpointing]
    again = layer() if train.activation_checkpointing else 0.0  # of the one layer that is made again
    picked = 3 * shape.hidden * c + inputs  # where the head reads: states, their gradient and its sum
    token = held + again + _working(shape, c) + picked + BATCH_BYTES
    return Footprint(fixed, token, state if "paged" in train.optim else 0.0)


def scoring(config: PretrainedConfig, compute: torch.dtype) -> Footprint:
    """What a reward model takes that only scores: its weights, and one layer at a time."""
    shape, c = Shape.of(config), compute.itemsize
    token = _layer(shape, c, stream=c, casts=True, adapter=None) + BATCH_BYTES
    return Footprint({"weights": (shape.in_linears + shape.beside(reward=True)) * c}, token)


def _layer(
    shape: Shape, c: int, *, stream: int, casts: bool, adapter: AdapterSection | None, selective: bool = False
) -> float:
    """Bytes a token that a layer keeps for its backward; `c` is the size of a number, `stream` that of the residual.

    The input of the layer and the residual after attention, from which the norms are made again; what the norms give,
    once for all that read it, or with `casts` once for each; q, k and v after rotation; the output of attention with a
    logarithm for each head; gate and up; and their product where no fused adapter makes it again. With `selective` what
    the norms give and the MLP are made again too.
    """
    plain = adapter is None or adapter.use_dora
    kept = 2 * shape.hidden * stream + (2 * shape.query + 2 * shape.keys) * c + 4 * shape.heads + 8
    if adapter is not None:
        targets = {name: size for name, size in shape.linears.items() if _is_target(adapter, name)}
        kept += len(targets) * adapter.r * c
        if adapter.use_dora:  # each adapter keeps an input of its own, and what it gives
            kept += sum(inputs for inputs, _ in targets.values()) * 2 * c
    if selective:
        return kept + (3 * shape.hidden * c if casts else 0)
    remade = not plain and stream == c
    return kept + (5 if casts else 2) * shape.hidden * c + (2 if remade else 3) * shape.inner * c


def _working(shape: Shape, c: int) -> float:
    """Bytes a token while a layer runs backward: gradients of gate, up and product, of attention, fp32 of a norm."""
    return 4 * shape.inner * c + (3 * shape.query + 2 * shape.keys) * c + 12 * shape.hidden


def _head(shape: Shape, c: int, kind: str, *, trains: bool) -> float:
    """A chunk of logits in fp32 and in the compute dtype; where the head trains, its fp32 gradient and two casts."""
    chunk = 4 * rows_at_once(shape.vocabulary, kind) * shape.vocabulary
    return chunk * (1 + c / 4) + (shape.in_table * (4 + 2 * c) if trains else 0)


def _in_adapter(shape: Shape, adapter: AdapterSection, reward: bool) -> int:
    """Weights that train beside a frozen base."""
    sizes = {name: inputs * outputs * shape.layers for name, (inputs, outputs) in shape.linears.items()}
    sizes |= {"embed_tokens": shape.in_table, "lm_head": shape.in_table}
    saved = sum(sizes.get(name, 0) for name in adapter.modules_to_save)
    adapted = [size for name, size in shape.linears.items() if _is_target(adapter, name)]
    ranks = sum(adapter.r * (inputs + outputs) + (outputs if adapter.use_dora else 0) for inputs, outputs in adapted)
    return shape.layers * ranks + saved + (shape.hidden if reward else 0)


def _as_saved(adapter: AdapterSection | None) -> AdapterSection | None:
    """The section as the adapter that it goes on with would have it; a damaged one is refused elsewhere."""
    if adapter is None or adapter.path is None:
        return adapter
    try:
        saved = read_peft_config(adapter_directory(Path(adapter.path)))
    except ModelError:
        return adapter
    targets = saved.get("target_modules") or "all-linear"
    return adapter.model_copy(
        update={
            "r": max([int(saved.get("r", adapter.r)), *(saved.get("rank_pattern") or {}).values()]),
            "target_modules": "all-linear" if isinstance(targets, str) else tuple(targets),
            "modules_to_save": tuple(saved.get("modules_to_save") or ()),
            "use_dora": bool(saved.get("use_dora")),
        }
    )


def _is_target(adapter: AdapterSection, name: str) -> bool:
    targets = adapter.target_modules
    return targets == "all-linear" or any(target.rpartition(".")[2] == name for target in targets)


def _reference(adapter: AdapterSection | None, trained: float, other: PretrainedConfig | None, c: int) -> float:
    """Another model; or a copy of what trains, where that does not start as nothing on an untouched base."""
    if other is not None:
        shape = Shape.of(other)
        return (shape.in_linears + shape.beside(reward=False)) * c
    starts_off = adapter is None or adapter.path is not None or str(adapter.init_lora_weights).startswith("pissa")
    return trained if starts_off else 0.0


# --- the largest that fits ---


def largest(footprint: Footprint, total: float, kind: str, max_length: int) -> Choice:
    """The largest microbatch of a run on a device of `total` bytes; one sample of `max_length` must run in any case.

    Raises:
        RecipeError: what does not depend on the microbatch alone takes more than there is.
    """
    fixed = footprint.total_fixed
    if fixed - footprint.paged > total:
        largest_first = sorted(footprint.fixed.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{name} {bytes_ / 1e9:,.1f}" for name, bytes_ in largest_first if bytes_ >= 5e7)
        raise RecipeError(
            f"train.microbatch_tokens: auto finds none that fits: of {total / 1e9:,.1f} GB of memory the run takes "
            f"{fixed / 1e9:,.1f} GB before its first token ({parts}); train an adapter, set model.load_in_4bit: true, "
            "or give a number here to try it all the same"
        )
    room = (SHARE[kind] * total - fixed) / footprint.token
    multiple = MULTIPLE if room >= MULTIPLE else ROW_MULTIPLE
    fits = max(0, int(room) // multiple * multiple)
    beside = f"{fixed / 1e9:,.2f} GB, at {footprint.token / 1e6:,.2f} MB a token"
    filled = f"{100 * SHARE[kind]:.0f}% of {total / 1e9:,.1f} GB"
    if min(fits, MOST_TOKENS[kind]) < max_length:
        if fits >= max_length:
            return Choice(max_length, "the longest sample that data.max_length and the base allow")
        return Choice(
            max_length,
            f"the longest sample that data.max_length and the base allow, while the estimate gives {fits:,} "
            f"({filled} beside {beside}); should memory run out, set train.activation_checkpointing: selective, or "
            "lower data.max_length",
        )
    if fits >= MOST_TOKENS[kind]:
        return Choice(MOST_TOKENS[kind], "more would fit, and be no faster")
    return Choice(fits, f"the most that fit {filled} beside {beside}")


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits(own: Path, root: Path) -> list[int]:
    """The memory limits of the control groups that this process is in, the wider ones too; none is none."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        place = Path(path.lstrip("/"))
        for group in (place, *place.parents):  # of which the last is the root, all that a container sees
            try:
                found.append(int((base / group / name).read_text(encoding="utf-8")))
            except (OSError, ValueError):  # not there, or `max`
                continue
    return found
