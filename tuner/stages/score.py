"""Prompts with answers and a reward model -> the reward of each answer, as JSON Lines: what `tuner score` does.

With a second reward model, of safety, the two are combined by the rule of Llama 2 (arXiv 2307.09288, section 3.2.3).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuner import recipe as recipes
from tuner.data import source
from tuner.data.formats import FORMATS, shorten
from tuner.data.pack import bins, pack
from tuner.data.render import Renderer
from tuner.data.report import place
from tuner.data.resolve import resolve_template
from tuner.data.stream import find_format, make_renderer, rendered
from tuner.errors import DataError, ModelError, NonFiniteError, RecipeError, UserError
from tuner.losses.reward import llama2_combined, whiten
from tuner.model.adapter import read_peft_config
from tuner.model.load import check_checkpoint, is_classifier, load_tokenizer
from tuner.model.reward import RewardModel
from tuner.recipe import DataSection, DataSource, Scoring
from tuner.stages.reward import measure
from tuner.stages.sample import Subject, find_subject, load_subject, prepare_output, write_rows
from tuner.train.memory import largest, scoring, total_memory
from tuner.types import ANSWERS, Example, Ranked, Tokens

READS = ("model.dtype", "data.format", "data.columns", "data.max_length", "data.overlong", "data.on_bad_row")
TAG = "unsafe"  # the key of a row that says that its prompt may elicit unsafe answers


@dataclass(frozen=True)
class Row:
    """A row of the file whose answers are to be scored, rendered for one model."""

    tokens: Tokens
    order: tuple[int, ...]  # where in the row each branch stands
    compared: bool  # whether the data says which of its answers are the better ones: the first branch is the best

    @property
    def number(self) -> int:
        """Line or row of the file, counted from 1."""
        return self.tokens.row + 1

    def in_order(self, values: Tensor) -> list[float]:
        """Values of the branches `[K]`, in the order of the row."""
        found = dict(zip(self.order, values.tolist(), strict=True))
        return [round(found[i], 6) for i in range(len(found))]


@dataclass(frozen=True)
class Scores:
    """What one reward model says of the rows that it could use: `rewards[i]` is `[K]`, of the branches of `rows[i]`."""

    rows: Sequence[Row]
    rewards: Sequence[Tensor]

    def only(self, numbers: set[int]) -> Scores:
        """Of these rows alone."""
        kept = [(r, v) for r, v in zip(self.rows, self.rewards, strict=True) if r.number in numbers]
        return Scores([row for row, _ in kept], [values for _, values in kept])


def run(
    *,
    model: str | None,
    adapter: Path | None,
    file: Path,
    safety: str | None = None,
    base: str | None = None,
    chat_template: str | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> list[dict[str, Any]]:
    """Scores every answer of `file`, and gives and writes one object for each row (see `tuner score --help`).

    Exactly one of `model` and `adapter` is given; `safety` is either of the two. `base` is where the base of an adapter
    lies now, if it has moved. A run brings its template, its data.max_length and its model.dtype; `overrides` are keys
    of `READS`. The rows are JSON Lines, on stdout or in `output`, which must not exist.

    Raises:
        UserError: a row, a checkpoint, an adapter, a template or a setting that cannot be used.
    """
    prepare_output(output)
    subjects = [("--adapter" if adapter else "--model", find_subject(model, adapter, base))]
    if safety is not None:
        subjects.append(("--safety", _either(safety, base)))
    if base is not None and not any(subject.adapter for _, subject in subjects):
        raise UserError("--base says where the base of an adapter lies, and there is no adapter; leave it out")
    settings = []
    for option, subject in subjects:
        check_gives_rewards(subject, option)
        settings.append(_settings(subject, file, overrides))
    tags = read_tags(settings[0].data.train[0]) if safety is not None else {}
    found = [
        read(s, given, chat_template, tagged=safety is not None)
        for (_, s), given in zip(subjects, settings, strict=True)
    ]
    scores = [_score(s, g, rows) for (_, s), g, rows in zip(subjects, settings, found, strict=True)]
    rows, summary = _single(scores[0]) if safety is None else _combined(scores[0], scores[1], tags)
    write_rows(rows, output)
    print(summary, file=sys.stderr)
    return rows


# --- models and settings ----------------------------------------------------------------------------------------------


def _either(given: str, base: str | None) -> Subject:
    """The run, adapter or checkpoint that `--safety` names."""
    path = Path(given).expanduser()
    adapted = any((path / name).is_file() for name in ("adapter_config.json", "adapter/adapter_config.json"))
    try:
        return find_subject(None, path, base) if adapted else find_subject(given, None)
    except ModelError as error:
        text = str(error).removeprefix("--model: ").removeprefix("--adapter: ")
        raise ModelError(f"--safety: {text}") from None


def check_gives_rewards(subject: Subject, option: str) -> None:
    """Refuses a causal model before anything is read. ModelError: it is one, or its files cannot be used."""
    if subject.adapter is not None:
        rewards, name = read_peft_config(subject.adapter).get("task_type") == "SEQ_CLS", str(subject.adapter)
    else:
        rewards, name = is_classifier(check_checkpoint(subject.model, reward=True)[1]), subject.model.name_or_path
    if not rewards:
        raise ModelError(
            f"{option}: '{name}' is a causal model, which writes text and gives no rewards; train a reward model with "
            "`tuner reward`"
        )


def _settings(subject: Subject, file: Path, overrides: Sequence[str]) -> Scoring:
    """How rows are read and the model is computed with: as the run does, where it is one, and as `overrides` say."""
    _, config = check_checkpoint(subject.model, reward=True)
    positions, own = config.max_position_embeddings, subject.recipe
    length = min(own.data.max_length, positions) if own else positions
    model = subject.model
    if own and not model.load_in_4bit:  # a 4-bit base keeps the dtype that it was quantised from
        model = model.model_copy(update={"dtype": own.model.dtype})
    data = DataSection(train=(DataSource(path=str(file)),), max_length=length, cache=False)
    found = recipes.overridden(Scoring(model=model, data=data), overrides, READS)
    if found.data.overlong == "truncate":
        raise RecipeError(
            "data.overlong: a reward is read at the end of an answer, which truncate cuts off; set it to drop"
        )
    if found.data.max_length > positions:
        raise RecipeError(
            f"data.max_length: {found.data.max_length} is more than the {positions:,} positions that "
            f"{subject.model.name_or_path} was made for; lower it"
        )
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def read(subject: Subject, settings: Scoring, chat_template: str | None, *, tagged: bool = False) -> list[Row]:
    """Reads and renders the file, and says on stderr what was left out, cut or not read; `tagged` rows are read for it.

    Raises:
        DataError: a row cannot be used, and data.on_bad_row does not skip such; or none is left.
    """
    data = settings.data
    (where,) = data.train
    tokenizer = load_tokenizer(subject.tokenizer, subject.model.revision)
    detected = find_format(where, data)
    if FORMATS.get(detected.name).kind == "text":
        raise DataError(f"{where.path} is of the format '{detected.name}', which has no answers to score")
    renderer = make_renderer(data, tokenizer, resolve_template(chat_template or subject.chat_template, tokenizer))
    rows = [
        row
        for some in rendered(where, detected, data, renderer)
        for example, samples in some
        for row in _rows(example, samples, data, renderer)
    ]
    if tagged:
        renderer.report.unread_columns.pop(TAG, None)
    for line in renderer.report.odd():
        print(line, file=sys.stderr)
    if not rows:
        raise DataError(f"no usable rows in {where.path}")
    return rows


def _rows(example: Example, samples: Sequence[Tokens], data: DataSection, renderer: Renderer) -> list[Row]:
    """The row of an example; none if it was left out. DataError: it ends with somebody else's turn."""
    if not samples:
        return []
    last = next((c[-1].role for c in example.completions if c[-1].role not in ANSWERS), None)
    if last is not None:
        where = place(example.source, example.row)
        error = f"it ends with a {last} turn, so that it has no answer to score; remove that turn"
        if data.on_bad_row != "skip":
            raise DataError(f"{where}: {error}")
        renderer.report.count("skipped", where, error)
        return []
    (tokens,), count, scores = samples, len(example.completions), example.scores or ()
    # of two answers that the data calls equally good none is the better one
    return [Row(tokens, example.order or tuple(range(count)), count > 1 and len(set(scores)) == len(scores))]


def read_tags(where: DataSource) -> dict[int, bool]:
    """Line or row, counted from 1 -> whether its prompt is tagged as one that may elicit unsafe answers.

    DataError: a tag that is neither true nor false.
    """
    tags = {}
    for index, row in source.rows(where, on_bad=lambda *_: None):
        tag = row.get(TAG)
        if tag is not None and not isinstance(tag, bool):
            raise DataError(f"{place(where.path, index)}: {TAG} is {shorten(tag)}; write true or false")
        tags[index + 1] = bool(tag)
    return tags


# --- rewards ----------------------------------------------------------------------------------------------------------


def _score(subject: Subject, settings: Scoring, rows: Sequence[Row]) -> Scores:
    """Loads the model, and lets go of it afterwards."""
    subject = Subject(settings.model, subject.adapter, subject.chat_template, subject.tokenizer, subject.recipe)
    model = load_subject(subject, RewardModel)
    footprint, capacity = scoring(model.inner.config, model.compute_dtype), settings.data.max_length
    with suppress(RecipeError):  # by the estimate not even the weights fit, but they are there: one row at a time
        capacity = largest(footprint, total_memory(model.device), model.device.type, capacity).tokens
    return Scores(rows, rewards(model, [row.tokens for row in rows], capacity))


def rewards(model: RewardModel, samples: Sequence[Tokens], capacity: int) -> list[Tensor]:
    """The rewards of the answers of each sample, `[branches]` float32 on the host; of a chat, its one reward.

    Args:
        capacity: tokens that run at once; prompts are shared, and samples packed.

    Raises:
        NonFiniteError: a reward is NaN or infinite; names the row.
    """
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    for indices in bins([len(sample) for sample in samples], capacity):
        batch = pack([samples[i] for i in indices])
        with torch.no_grad():
            values = model(batch.to(model.device)).cpu()
        for document, i in enumerate(indices):
            found[i] = values[batch.seq_doc == document]
            assert len(found[i]) == max(1, len(samples[i].branches)), "every answer has a reward"
            if not found[i].isfinite().all():
                where = place(samples[i].source, samples[i].row)
                raise NonFiniteError(f"{where}: the reward is {found[i].tolist()}; nothing was written")
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def _single(scores: Scores) -> tuple[list[dict[str, Any]], str]:
    rows = [
        {"row": row.number, "rewards": row.in_order(values), **_preferred(row, values)}
        for row, values in zip(scores.rows, scores.rewards, strict=True)
    ]
    return rows, _summary(scores, {"reward": scores})


def _combined(helpful: Scores, safe: Scores, tags: Mapping[int, bool]) -> tuple[list[dict[str, Any]], str]:
    """The rows that both models could use."""
    numbers = {row.number for row in helpful.rows} & {row.number for row in safe.rows}
    if not numbers:
        raise DataError("there is no row that both models can use; see what was left out for each of them")
    helpful, safe = helpful.only(numbers), safe.only(numbers)
    sizes = [len(values) for values in helpful.rewards]
    unsafe = torch.tensor([tags[row.number] for row in helpful.rows]).repeat_interleave(torch.tensor(sizes))
    combined = llama2_combined(torch.cat(list(helpful.rewards)), torch.cat(list(safe.rewards)), unsafe)
    parts = {
        "helpfulness": helpful.rewards,
        "safety": safe.rewards,
        "combined": combined.split(sizes),
        "whitened": whiten(combined.double()).split(sizes),
    }
    final = Scores(helpful.rows, parts["combined"])
    rows = []
    for i, row in enumerate(final.rows):
        values = {name: row.in_order(part[i]) for name, part in parts.items()}
        rows.append({"row": row.number, TAG: tags[row.number], **values, **_preferred(row, final.rewards[i])})
    return rows, _summary(final, {"helpfulness": helpful, "safety": safe, "combined": final})


def _preferred(row: Row, rewards: Tensor) -> dict[str, bool]:
    """Whether the preferred answer has the highest reward; nothing where none is preferred."""
    return {"preferred_highest": bool((rewards[0] > rewards[1:]).all())} if row.compared else {}


def _summary(final: Scores, means: Mapping[str, Scores]) -> str:
    """One line: rows, answers, mean rewards; and where answers are compared, the accuracy, as in the reward stage."""
    answers = sum(map(len, final.rewards))
    parts = [f"{len(final.rows):,} rows, {answers:,} answers"]
    parts += [f"mean {name} {float(torch.cat(list(s.rewards)).mean()):+.4f}" for name, s in means.items()]
    lists = [values for row, values in zip(final.rows, final.rewards, strict=True) if row.compared]
    if lists:
        ranked = Ranked(pad_sequence(lists, batch_first=True), torch.tensor([len(values) for values in lists]))
        right = float(measure(ranked)["accuracy"]) / len(lists)
        parts.append(f"accuracy {right:.1%} of the pairs in {len(lists):,} rows that compare answers")
    return "; ".join(parts)
