"""A recipe -> what every training stage needs before its first step: data, run directory, model, session."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from tuner import kernels
from tuner import recipe as recipes
from tuner.checkpoint import Checkpoint, RunDir, file_entries
from tuner.data.check import check
from tuner.data.check.brief import brief
from tuner.data.check.report import CheckReport
from tuner.data.fit import Fit
from tuner.data.formats import Kind
from tuner.data.plan import Plan
from tuner.data.render import Renderer
from tuner.data.report import place
from tuner.data.stream import Split, choose_template, holdout, load_split, make_renderer
from tuner.data.templates import Template, control_ids, fingerprint
from tuner.errors import DataError, RecipeError, TunerError, printable
from tuner.evaluate import Question, read_questions
from tuner.model.adapted import LanguageModel
from tuner.model.adapter import (
    adapter_directory,
    attach,
    check_continues,
    check_trained_tokens,
    matched_modules,
)
from tuner.model.backbone import Backbone
from tuner.model.fuse import fuse
from tuner.model.load import (
    DTYPES,
    base_fingerprint,
    find_checkpoint,
    load_base,
    load_config,
    load_tokenizer,
)
from tuner.model.reference import disable_dropout
from tuner.recipe import PREFERENCE, Recipe
from tuner.stages.machine import Machine, check_start, find_machine
from tuner.stages.result import quantization, save_result
from tuner.stages.rows import accepted
from tuner.train.answers import Answers
from tuner.train.memory import microbatch
from tuner.train.session import Session
from tuner.train.setup import (
    Devices,
    find_devices,
    seed_everything,
)
from tuner.train.stage import Stage

# A run may be moved together with its files: these are compared by the hashes of what they name.
KNOWN_BY_CONTENT = (
    "model.name_or_path",
    "data.train",
    "data.eval",
    "eval.questions",
    "adapter.path",
    "train.output_dir",
)


# --- data ---


@dataclass(frozen=True)
class Data:
    """Everything about the data of a run, rendered, planned and hashed."""

    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    renderer: Renderer  # for prompts and stop ids
    train: Split
    held_out: Split | None
    questions: Sequence[Question]
    plan: Plan

    def identity(self) -> dict[str, str]:
        """Hashes that a resumed run must find unchanged."""
        return {
            "data.train (content)": self.train.hash,
            "data.eval (content)": self.held_out.hash if self.held_out else "none",
            "eval.questions (content)": _hash_questions(self.questions),
            "data.chat_template (text)": fingerprint(self.template.saved()) if self.template else "none",
        }


def _hash_questions(questions: Sequence[Question]) -> str:
    return hashlib.sha256(repr(questions).encode()).hexdigest() if questions else "none"


def data(
    recipe: Recipe,
    devices: Devices,
    console: Console,
    accepts: Sequence[Kind] = ("chat", "text"),
    fit: Fit | None = None,
) -> Data:
    """Reads, renders and plans; prints what was found, and every row that was left out.

    `accepts` are the kinds of rows that the stage can use, and `fit` is what its loss reads of each.
    """
    section, train = recipe.data, recipe.train
    tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.model.revision)
    template = choose_template(section.train, section, tokenizer)
    split = load_split(section.train, section, tokenizer, template, seed=train.seed, accepts=accepts, fit=fit)
    held_out: Split | None = None
    if isinstance(section.eval, float):
        split, held_out = holdout(split, section.eval)
    elif section.eval:
        held_out = load_split(section.eval, section, tokenizer, template, seed=train.seed, accepts=accepts, fit=fit)
    questions = read_questions(recipe.eval.questions) if recipe.eval.questions else ()
    assert isinstance(train.microbatch_tokens, int)
    plan = Plan(
        split.tokens.lengths,
        batch_size=train.batch_size,
        batch_unit=train.batch_unit,
        microbatch_tokens=train.microbatch_tokens,
        packing=section.packing,
        num_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        seed=train.seed,
        world_size=devices.world_size,
    )
    renderer = make_renderer(section, tokenizer, template)
    found = Data(tokenizer, template, renderer, split, held_out, questions, plan)
    if devices.is_main:
        _print_data(found, recipe, console)
    return found


def check_data(recipe: Recipe) -> CheckReport:
    """What is wrong with the data of a recipe, and what training would make of it on this machine."""
    devices, data, train = find_devices(), recipe.data, recipe.train
    accepts, fit = accepted(recipe)
    return check(
        data,
        train,
        load_tokenizer(recipe.model.name_or_path, recipe.model.revision),
        microbatch_tokens=microbatch(recipe, devices).tokens,
        world_size=devices.world_size,
        accepts=accepts,
        fit=fit,
    )


def _print_data(found: Data, recipe: Recipe, console: Console) -> None:
    here = f"{Path.cwd()}{os.sep}"

    def say(label: str, lines: Sequence[str]) -> None:
        for i, line in enumerate(lines):
            console.print(f"{label if i == 0 else '':<9}{printable(line.replace(here, ''))}")

    say("data", found.train.report.lines())
    if found.held_out:
        say("held out", found.held_out.report.lines())
    taught = recipe.data.train_on != "all" and recipe.data.train_control_tokens
    ends = found.renderer.terminator_ids if taught else ()
    held_out = found.held_out.tokens if isinstance(recipe.data.eval, tuple) and found.held_out else None
    say("check", brief(found.train.tokens, held_out, bos=found.tokenizer.bos_token_id, terminators=ends))
    template = found.template.name if found.template else "none (raw text)"
    date = found.template.settings().get("date_string") if found.template else None
    said = f", with the date {date}" if date else ""
    say("template", [f"{template}{said}; trained: {recipe.data.train_on}"])
    plan, unit = found.plan, recipe.train.batch_unit
    epochs = plan.epochs_done(plan.num_steps)
    size = f"{recipe.train.batch_size:,} {unit}"
    say("plan", [f"{plan.num_steps:,} steps of {size} ({epochs:.4g} epochs of {plan.steps_per_epoch:,} steps)"])


@dataclass(frozen=True)
class Start:
    """Where every stage starts from: the machine, the recipe with every automatic value decided, and its data."""

    machine: Machine
    recipe: Recipe
    console: Console  # silent on all ranks but the main one
    data: Data


def start(
    recipe: Recipe, *, resume: bool, overwrite: bool, accepts: Sequence[Kind] = ("chat", "text"), fit: Fit | None = None
) -> Start:
    """Decides what is automatic, refuses what can be refused at once, and reads the data."""
    here = find_machine(recipe, resume=resume)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not here.devices.is_main)
    check_start(here.recipe, here.devices, resume=resume, overwrite=overwrite)
    return Start(here, here.recipe, console, data(here.recipe, here.devices, console, accepts, fit))


def report_dry_run(start: Start) -> dict[str, Any]:
    """What a dry run returns: the counts, without training."""
    start.console.print("dry run  nothing was trained or written")
    return {"steps": start.data.plan.num_steps, "data": start.data.train.report.as_dict()}


# --- run directory ---


@dataclass(frozen=True)
class Opened:
    """A run directory that is ready: on the main rank with its lock, on the others only what they need to know."""

    run: RunDir | None
    checkpoint: Checkpoint | None
    finished: bool
    base_sha256: str
    summary: Mapping[str, Any] = field(default_factory=dict)


def identity_of(recipe: Recipe, data: Data, base_sha256: str) -> dict[str, Any]:
    """What a resumed run must find unchanged: keys of the recipe, and hashes of what it reads."""
    keys = {k: v for k, v in recipes.flatten(recipe).items() if k not in KNOWN_BY_CONTENT}
    identity = keys | data.identity() | {"model (weights)": base_sha256}
    if recipe.adapter is not None and recipe.adapter.path is not None:
        start = adapter_directory(Path(recipe.adapter.path))
        identity["adapter.path (files)"] = {name: entry["sha256"] for name, entry in file_entries(start).items()}
    if recipe.reference.model != "auto":
        identity["reference.model"] = f"sha256 {base_fingerprint(recipe.reference.model)}"
    return identity


@contextmanager
def open_run(start: Start, resume: bool, overwrite: bool, allow_drift: Sequence[str]) -> Iterator[Opened]:
    """Makes, resumes or replaces the run directory on the main rank, and tells the others what it found."""
    recipe, machine, data, console = start.recipe, start.machine, start.data, start.console
    if not machine.devices.is_main:
        yield _hear()
        return
    with ExitStack() as stack:
        try:
            base_sha256 = base_fingerprint(recipe.model.name_or_path, recipe.model.revision)
            identity = identity_of(recipe, data, base_sha256)
            run = RunDir.create(
                Path(recipe.train.output_dir),
                recipes.dump(recipe),
                identity,
                resume=resume,
                overwrite=overwrite,
                allow_drift=allow_drift,
                log=lambda line: console.print(line),
            )
            stack.enter_context(run)
            checkpoint = run.latest() if resume and not run.finished else None
        except TunerError as error:
            _tell(error)
            raise
        opened = Opened(run, checkpoint, run.finished, base_sha256, run.manifest.get("summary", {}))
        _tell(replace(opened, run=None))
        if run.finished:
            console.print(f"{recipe.train.output_dir} has finished already; --overwrite would replace it")
        else:
            reports = {"train": data.train.report.as_dict()}
            if data.held_out:
                reports["eval"] = data.held_out.report.as_dict()
            run.record(data=reports, template=_template_record(data.template), commit=recipe.model.revision)
        yield opened


def _template_record(template: Template | None) -> dict[str, Any] | None:
    """The template for the manifest, with every option, the date among them; None for raw text."""
    if template is None:
        return None
    named = {"name": template.name, "options": template.settings(), "control_tokens": dict(template.renamed)}
    return named | {"sha256": fingerprint(template.saved())}


def _tell(found: Opened | TunerError) -> None:
    """The main rank says to the others what it found, or why it cannot go on."""
    if dist.is_initialized():
        dist.broadcast_object_list([found], src=0)


def _hear() -> Opened:
    """What the main rank found; its error is raised here too, so that all ranks end for the same reason."""
    values: list[Any] = [None]
    dist.broadcast_object_list(values, src=0)
    if isinstance(values[0], TunerError):
        raise values[0]
    assert isinstance(values[0], Opened)
    return values[0]


# --- model ---


Scorer = TypeVar("Scorer", bound=Backbone)


@dataclass(frozen=True)
class Model(Generic[Scorer]):
    """The policy or reward model to train, and how its result is saved."""

    policy: Scorer
    save_result: Callable[[RunDir], Path]


def load_model(kind: type[Scorer], start: Start, base_sha256: str) -> Model[Scorer]:
    """Loads the base, attaches the adapter, swaps in the fused modules and checks what can be checked before a step."""
    recipe, machine, data, console = start.recipe, start.machine, start.data, start.console
    machine.phases.begin("model")
    full = recipe.adapter is None
    device, model = machine.devices.device, recipe.model
    reward = recipe.stage == "reward"
    base = load_base(model, device, trainable=full, param_dtype=DTYPES[recipe.train.param_dtype], reward=reward)
    stored = load_config(find_checkpoint(model.name_or_path, model.revision)).dtype
    stored_dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    if recipe.adapter is not None and recipe.adapter.path is not None:
        check_continues(Path(recipe.adapter.path), base_sha256, quantization(recipe))
    lm: LanguageModel = base if recipe.adapter is None else attach(base, recipe.adapter)
    saved = recipe.adapter.modules_to_save if recipe.adapter else ()
    check_trained_tokens(base, _control_tokens(data), trained=full or "embed_tokens" in saved)
    if data.template is not None:
        needed = {"embed_tokens"} if reward else {"embed_tokens", "lm_head"}
        _check_slots(data.template, full or needed <= set(saved))
    _check_context(base.config.max_position_embeddings, data)
    if recipe.stage in PREFERENCE:
        disable_dropout(lm)
    functions = kernels.load(model.kernels, model.attn_implementation)
    fuse(lm, functions, recompute=recipe.train.activation_checkpointing)
    policy = kind(
        lm,
        compute_dtype=DTYPES[model.dtype],
        kernels=functions,
        attn_implementation=model.attn_implementation,
    )
    # Every rank started from one seed, so that adapters begin equal; from here on each draws its own dropout.
    seed_everything(recipe.train.seed + machine.devices.rank)
    if machine.devices.is_main:
        _print_model(recipe, policy, machine.backends, console)
        console.print(f"microbatch  {machine.microbatch.tokens:,} tokens: {machine.microbatch.why}")
    return Model(policy, lambda run: save_result(run, recipe, data, lm, stored_dtype, base_sha256))


def _control_tokens(data: Data) -> dict[int, str]:
    """Id -> text of the control tokens that the model has to know: the template's, and others that the data holds."""
    ids = control_ids(data.tokenizer)
    special = {i: t.content for i, t in data.tokenizer.added_tokens_decoder.items() if t.special}
    own = (*data.template.control, *data.template.optional, *data.template.tags) if data.template else ()
    names = {ids[name]: name for name in own if name in ids} | special
    held = {i for block in data.train.tokens.blocks for i in block.present(list(names))}
    held.update(ids[name] for name in (data.template.control if data.template else ()))
    return {i: names[i] for i in sorted(held)}


def _check_slots(template: Template, trained: bool) -> None:
    """Refuses reserved slots in the place of control tokens where nothing would train them."""
    if template.renamed and not trained:
        slots = ", ".join(template.renamed.values())
        raise RecipeError(
            f"data.control_tokens: {slots} would stand for control tokens that the base has never seen, and stay "
            "frozen; add adapter.modules_to_save: [embed_tokens, lm_head], or fine-tune the full weights"
        )


def _check_context(positions: int, data: Data) -> None:
    """Refuses samples longer than the positions that the base was made for."""
    for split in (data.train, data.held_out) if data.held_out else (data.train,):
        for i in np.flatnonzero(split.tokens.reach > positions)[:1].tolist():
            raise DataError(
                f"{place(*split.tokens.origin(i))}: {split.tokens.reach[i]:,} tokens, and the base was made for "
                f"{positions:,} positions; set data.max_length: {positions} and say with data.overlong what happens to "
                "longer rows"
            )


def _print_model(recipe: Recipe, policy: Backbone, backends: str, console: Console) -> None:
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = policy.inner.num_parameters()  # knows that 4-bit tensors hold two weights a byte
    total -= trained if recipe.adapter is not None else 0
    if recipe.adapter is None:
        how = f"full fine-tuning of {trained:,} parameters, stored in {recipe.train.param_dtype}"
        if recipe.train.param_dtype == "bfloat16":
            console.print("warning  train.param_dtype bfloat16 rounds away small updates; use it only to save memory")
    else:
        modules = ", ".join(f"{count} {name}" for name, count in matched_modules(policy.lm).items())
        base = f"{recipe.model.bnb_4bit_quant_type} base" if recipe.model.load_in_4bit else "base"
        how = f"LoRA on a frozen {base}: {trained:,} parameters train ({modules})"
    name = (
        os.path.relpath(recipe.model.name_or_path)
        if os.path.isdir(recipe.model.name_or_path)
        else recipe.model.name_or_path
    )
    console.print(f"model    {name}, {total:,} parameters, computed in {recipe.model.dtype}")
    console.print(f"         {how}")
    console.print(f"         {backends}")


def session(start: Start, opened: Opened, model: Model[Any], stage: Stage, answers: Answers | None = None) -> Session:
    """The run of a stage, ready to train."""
    recipe, machine, data, console = start.recipe, start.machine, start.data, start.console
    return Session(
        recipe=recipe,
        devices=machine.devices,
        phases=machine.phases,
        run=opened.run,
        policy=model.policy,
        stage=stage,
        samples=data.train.tokens,
        plan=data.plan,
        held_out=data.held_out.tokens if data.held_out else (),
        questions=data.questions,
        renderer=data.renderer,
        tokenizer=data.tokenizer,
        save_result=model.save_result,
        console=console,
        answers=answers,
    )
