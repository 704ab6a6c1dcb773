"""A recipe -> the machine that it runs on, with every automatic value decided, and what can be refused at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tuner import kernels
from tuner import recipe as recipes
from tuner.checkpoint import RECIPE, check_output
from tuner.errors import RecipeError, TunerError
from tuner.model.adapter import adapter_directory, check_files
from tuner.model.load import check_checkpoint, find_checkpoint, load_config, resolve_dtype
from tuner.model.quantize import check_optimizer
from tuner.recipe import PREFERENCE, Recipe
from tuner.train.memory import Choice, microbatch
from tuner.train.metrics import tracker_classes
from tuner.train.phases import Phases
from tuner.train.setup import Devices, find_devices, resolve_threads, seed_everything

AUTOMATIC = (
    "model.revision",
    "model.dtype",
    "model.attn_implementation",
    "model.kernels",
    "train.microbatch_tokens",
    "train.threads",
)


AS_BEFORE = "as decided at the start of the run"


@dataclass(frozen=True)
class Machine:
    """The devices of this process, and the recipe with every automatic value decided for them."""

    recipe: Recipe
    devices: Devices
    backends: str  # what attention and the other operations run on, and why, for people
    microbatch: Choice
    phases: Phases


def find_machine(recipe: Recipe, *, resume: bool) -> Machine:
    """Decides every `auto` once; a resumed run reuses what it decided at its start."""
    phases, devices = Phases(), find_devices()
    decided = _decided_before(recipe) if resume else {}
    recipe = recipes.resolved(recipe, decided)
    model, train = recipe.model, recipe.train
    checkpoint = find_checkpoint(model.name_or_path, model.revision)
    config = load_config(checkpoint)
    dtype = resolve_dtype(model.dtype, devices.device)
    backend, why = kernels.resolve_backend(model.kernels, devices.device)
    attention, why_attention = kernels.resolve_attention(
        model.attn_implementation,
        devices.device,
        dtype,
        backend,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dropout=0.0 if recipe.stage in PREFERENCE else config.attention_dropout,  # which these set to zero
    )
    why, why_attention = (
        AS_BEFORE if key in decided else reason
        for key, reason in (("model.kernels", why), ("model.attn_implementation", why_attention))
    )
    threads = resolve_threads(train.threads, devices.world_size)
    recipe = recipes.resolved(
        recipe,
        {
            **(
                {} if checkpoint.commit is None else {"model.revision": checkpoint.commit}
            ),  # asked once; a branch may move meanwhile
            "model.dtype": str(dtype).removeprefix("torch."),
            "model.attn_implementation": attention,
            "model.kernels": backend,
            "train.threads": threads,
        },
    )
    choice = microbatch(recipe, devices)
    if "train.microbatch_tokens" in decided:
        choice = replace(choice, why=AS_BEFORE)
    recipe = recipes.resolved(recipe, {"train.microbatch_tokens": choice.tokens})
    if recipe.adapter is None and train.param_dtype == "bfloat16" != recipe.model.dtype:
        raise RecipeError(
            f"train.param_dtype: weights stored in bfloat16 cannot be computed with in {recipe.model.dtype}; set "
            "model.dtype: bfloat16, or train.param_dtype: float32"
        )
    torch.set_num_threads(threads)
    seed_everything(train.seed)
    phases.begin("data")
    backends = f"attention {attention} ({why_attention}); kernels {backend} ({why})"
    return Machine(recipe, devices, backends, choice, phases)


def _decided_before(recipe: Recipe) -> dict[str, Any]:
    """What the run decided at its start of what the recipe leaves open."""
    stored, given = Path(recipe.train.output_dir) / RECIPE, recipes.flatten(recipe)
    if not stored.is_file():
        return {}
    before = recipes.flatten(recipes.load(stored, find_inputs=False))
    return {k: before[k] for k in AUTOMATIC if given.get(k) in ("auto", None) and before.get(k) is not None}


def check_start(recipe: Recipe, devices: Devices, *, resume: bool, overwrite: bool) -> None:
    """Refuses at once what would otherwise be refused only after the data is tokenised and the weights are hashed.

    Raises:
        RunDirError: a run may not start in train.output_dir.
        ModelError, RecipeError: the checkpoint or the adapter to go on with cannot be used, or a tracker is not there.

    The main rank looks, and all ranks end for the same reason.
    """
    found: list[TunerError | None] = [None]
    if devices.is_main:
        try:
            check_output(Path(recipe.train.output_dir), resume=resume, overwrite=overwrite, reads=_reads(recipe))
            tracker_classes(recipe.log.report_to)
            check_checkpoint(recipe.model, reward=recipe.stage == "reward")
            if recipe.train.optim != "adamw_torch":
                check_optimizer(recipe.train.optim, devices.device)
            if recipe.adapter is not None and recipe.adapter.path is not None:
                check_files(adapter_directory(Path(recipe.adapter.path)))
        except TunerError as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise found[0]


def _reads(recipe: Recipe) -> dict[str, str]:
    """What the run reads, by recipe key: paths, and Hub ids."""
    reads = {"model.name_or_path": recipe.model.name_or_path}
    reads |= {f"data.train[{i}]": source.path for i, source in enumerate(recipe.data.train)}
    if isinstance(recipe.data.eval, tuple):
        reads |= {f"data.eval[{i}]": source.path for i, source in enumerate(recipe.data.eval)}
    if recipe.eval.questions is not None:
        reads["eval.questions"] = recipe.eval.questions
    if recipe.adapter is not None and recipe.adapter.path is not None:
        reads["adapter.path"] = recipe.adapter.path
    if recipe.reference.model != "auto":
        reads["reference.model"] = recipe.reference.model
    return reads
