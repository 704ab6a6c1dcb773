"""Prompts and a checkpoint or adapter -> answers, printed or written as JSON Lines: what `tuner generate` does."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from tuner import recipe as recipes
from tuner.data import ghost, source
from tuner.data.formats._functions import tools_of
from tuner.data.formats.messages import to_messages
from tuner.data.render import Renderer
from tuner.data.report import place
from tuner.data.resolve import resolve_template
from tuner.data.templates import TEMPLATES, as_openai
from tuner.errors import DataError, ModelError, RunDirError, UserError
from tuner.generate import generate
from tuner.model.adapter import load_adapter, read_meta
from tuner.model.backbone import Backbone
from tuner.model.fuse import fuse
from tuner.model.load import load_base, load_tokenizer, padding_id, resolve_dtype
from tuner.model.policy import Policy
from tuner.model.reward import RewardModel
from tuner.recipe import DataSource, GenerateSection, ModelSection, Recipe
from tuner.types import Message


@dataclass(frozen=True)
class Subject:
    """What is to speak or to judge: a base or a full model, an adapter on it or none, and the template that it was
    trained with."""

    model: ModelSection
    adapter: Path | None
    chat_template: str
    tokenizer: str  # the directory or Hub id that holds it
    recipe: Recipe | None  # of the run, where it is one

    @property
    def settings(self) -> GenerateSection:
        """How answers are sampled: as the run does, where it is one."""
        return self.recipe.generate if self.recipe else GenerateSection()


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the assistant is to speak, and the functions it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt; `stopped` if it ended by itself and not at max_new_tokens."""

    prompt: Prompt
    text: str
    stopped: bool

    def row(self) -> dict[str, Any]:
        """As a row of JSON Lines."""
        tools = {"tools": list(self.prompt.tools)} if self.prompt.tools else {}
        turns = [as_openai(message) for message in self.prompt.messages]
        return {"messages": turns, **tools, "answer": self.text, "stopped": self.stopped}


def run(
    *,
    model: str | None,
    adapter: Path | None,
    prompt: str | None,
    file: Path | None,
    base: str | None = None,
    system: str | None = None,
    raw: bool = False,
    chat_template: str | None = None,
    ghost_attention: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> list[Answer]:
    """Answers `prompt`, or every prompt of `file`.

    Exactly one of `model` and `adapter`, and one of `prompt` and `file`, is given. `base` is where the adapter's base
    lies now, if it has moved. `raw` continues text without a template; `ghost_attention` asks with the system message
    in every user turn (see `tuner.data.ghost`), and gives the prompts back as they were. `settings` are keys of the
    recipe's generate section, on top of those of the run. One answer is printed as text; those of a file are JSON
    Lines, on stdout or in `output`, which must not exist.

    Raises:
        UserError: a prompt, a checkpoint, an adapter, a template or a setting that cannot be used.
    """
    prepare_output(output)
    if file is not None:
        prompts = read_prompts(file, system, raw)
    else:
        prompts = [Prompt(_with_system((_said(prompt, raw),), system, raw))]
    subject = find_subject(model, adapter, base)
    chosen = _settings(subject.settings, settings or {})
    tokenizer = load_tokenizer(subject.tokenizer, subject.model.revision)
    template = None if raw else resolve_template(chat_template or subject.chat_template, tokenizer)
    renderer = Renderer(tokenizer, template)
    said = [_haunted(p.messages) if ghost_attention else p.messages for p in prompts]
    ids = [renderer.prompt_ids(messages, p.tools) for messages, p in zip(said, prompts, strict=True)]
    answers = _answer(load_subject(subject, Policy), renderer, tokenizer, prompts, ids, chosen, seed)
    _write(answers, as_rows=file is not None, output=output)
    cut = sum(not answer.stopped for answer in answers)
    if cut:
        what = "the answer was" if len(answers) == 1 else f"{cut} of {len(answers)} answers were"
        print(f"{what} cut at --max-new-tokens {chosen.max_new_tokens}", file=sys.stderr)
    return answers


def prepare_output(output: Path | None) -> None:
    """Makes the folder of a file that is to be written. RunDirError: it exists, or its folder cannot be made."""
    if output is None:
        return
    if output.exists():
        raise RunDirError(f"'{output}' exists; give another --output, or move it away")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"--output: the folder of '{output}' cannot be made: {error.strerror}") from None


def read_prompts(file: Path, system: str | None, raw: bool) -> list[Prompt]:
    """The prompts of a .txt file (one a line), or of a data file with rows of `messages` or `prompt`."""
    if file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{file} is not UTF-8 text") from None
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        found = [(_said(line, raw),) for line in lines if line.strip()]
        if not found:
            raise DataError(f"{file} holds no prompts")
        return [Prompt(_with_system(messages, system, raw)) for messages in found]
    prompts = []
    for index, row in source.rows(DataSource(path=str(file))):
        try:
            asked = _prompt(row, raw)
            prompts.append(replace(asked, messages=_with_system(asked.messages, system, raw)))
        except DataError as error:
            raise DataError(f"{place(str(file), index)}: {error}") from None
    return prompts


def _prompt(row: Mapping[str, Any], raw: bool) -> Prompt:
    key = next((key for key in ("messages", "prompt", "text") if key in row), None)
    if key is None:
        raise DataError(f"has none of the keys messages, prompt and text; it has {', '.join(row) or 'none'}")
    if isinstance(row[key], str):
        return Prompt((_said(row[key], raw),))
    messages = to_messages(row[key], key)
    if raw:
        raise DataError(f"'{key}' is a list of messages, and --raw continues text; leave out --raw")
    if messages[-1].role == "assistant":
        raise DataError(f"'{key}' ends with the assistant's turn, so there is nothing to answer; remove that turn")
    return Prompt(messages, tools_of(row, {}))


def _said(text: str | None, raw: bool) -> Message:
    if not text:
        raise DataError("the prompt is empty")
    _refuse_surrogates(text)
    return Message("text" if raw else "user", text)


def _refuse_surrogates(text: str) -> None:
    """Bytes of the command line that are no UTF-8 reach Python as halves of surrogate pairs."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError("the prompt is not UTF-8 text")


def _with_system(messages: tuple[Message, ...], system: str | None, raw: bool) -> tuple[Message, ...]:
    if system is None:
        return messages
    if raw:
        raise UserError("--system has no effect with --raw; leave one of them out")
    _refuse_surrogates(system)
    if messages[0].role == "system":
        raise DataError("has a system message of its own; leave out --system")
    return (Message("system", system), *messages)


def _haunted(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not ghost.instruction(messages):
        raise UserError("--ghost-attention says the system message in every turn, and there is none; give --system too")
    return ghost.repeated(messages)


def find_subject(model: str | None, adapter: Path | None, base: str | None = None) -> Subject:
    """What `--model` or `--adapter` names: a run, a checkpoint or adapter directory, or a Hub id.

    Raises:
        ModelError: there is nothing of the kind, or the other option is meant.
    """
    if adapter is not None:
        return _adapter_subject(adapter, base)
    assert model is not None
    directory = Path(model).expanduser()
    if not directory.is_dir() and not recipes.is_hub_id(model):
        raise ModelError(f"--model: there is no directory '{model}' (a Hub id has the form org/name)")
    if (directory / "config.json").is_file() or not directory.is_dir():
        return Subject(ModelSection(name_or_path=model), None, "auto", model, None)
    if (directory / "model" / "config.json").is_file():
        inner = str(directory / "model")
        return Subject(ModelSection(name_or_path=inner), None, "auto", inner, _recipe_of(directory))
    if any((directory / name).is_file() for name in ("adapter_config.json", "adapter/adapter_config.json")):
        raise ModelError(f"--model: '{model}' holds an adapter; give it as --adapter {model}")
    raise ModelError(f"--model: '{model}' holds neither a checkpoint (config.json) nor a finished run")


def _adapter_subject(given: Path, base: str | None) -> Subject:
    given = given.expanduser()
    directory = next((d for d in (given, given / "adapter") if (d / "adapter_config.json").is_file()), None)
    if directory is None:
        if any((given / name).is_file() for name in ("config.json", "model/config.json")):
            raise ModelError(f"--adapter: '{given}' holds a full model; give it as --model {given}")
        kind = "holds no adapter_config.json and no finished run" if given.is_dir() else "is not a directory"
        raise ModelError(f"--adapter: '{given}' {kind}; give a run or an adapter directory")
    meta = read_meta(directory)
    if meta is None:
        raise ModelError(
            f"--adapter: '{directory}' has no tuner.json, so its base and template are not known for sure; it was not "
            "written by tuner, or is incomplete"
        )
    section = meta.base_section(base)
    # The tokenizer beside the adapter carries the very template that trained, with its options.
    beside = (directory / "tokenizer.json").is_file()
    tokenizer = str(directory) if beside else section.name_or_path
    template = "auto" if beside or meta.chat_template not in TEMPLATES else meta.chat_template  # else the base's own
    return Subject(section, directory, template, tokenizer, _recipe_of(directory.parent))


def _recipe_of(run_dir: Path) -> Recipe | None:
    """The recipe of a run, or None where there is no run."""
    file = run_dir / "recipe.yaml"
    return recipes.load(file, find_inputs=False) if file.is_file() else None


def _settings(own: GenerateSection, given: Mapping[str, Any]) -> GenerateSection:
    merged = own.model_dump() | dict(given)
    if not math.isfinite(merged["temperature"]):
        raise UserError(f"--temperature: expected a finite number, got {merged['temperature']}")
    if merged["temperature"] == 0:
        for key in ("top_k", "top_p"):
            if given.get(key) is not None:
                raise UserError(f"--{key.replace('_', '-')} has no effect at temperature 0; give --temperature too")
            merged[key] = None
    return GenerateSection(**merged)


Scorer = TypeVar("Scorer", bound=Backbone)


def load_subject(subject: Subject, kind: type[Scorer]) -> Scorer:
    """The model of a subject, as a `Policy` or a `RewardModel`, on the best device here and in evaluation mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(subject.model, device, trainable=False, reward=issubclass(kind, RewardModel))
    lm = base if subject.adapter is None else load_adapter(base, subject.adapter)
    fuse(lm)
    return kind(lm, compute_dtype=resolve_dtype(subject.model.dtype, device)).eval()


def _answer(
    policy: Policy,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    settings: GenerateSection,
    seed: int,
) -> list[Answer]:
    stop_ids = renderer.stop_ids
    with policy.generation_mode() as lm:
        rows = generate(lm, ids, stop_ids=stop_ids, pad_id=padding_id(tokenizer), seed=seed, **settings.model_dump())
    answers = []
    for prompt, row in zip(prompts, rows, strict=True):
        stopped = row[-1] in stop_ids
        text = tokenizer.decode(row[:-1] if stopped else row, clean_up_tokenization_spaces=False)
        answers.append(Answer(prompt, str(text), stopped))
    return answers


def _write(answers: Sequence[Answer], *, as_rows: bool, output: Path | None) -> None:
    if as_rows or output is not None:
        write_rows([answer.row() for answer in answers], output)
    if not as_rows:
        for answer in answers:
            print(answer.text)


def write_rows(rows: Iterable[Mapping[str, Any]], output: Path | None) -> None:
    """JSON Lines into a new file, or to stdout."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    if output is None:
        for line in lines:
            print(line)
        return
    with output.open("x", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
