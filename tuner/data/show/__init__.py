"""A recipe and a row -> its tokens as people can see them: trained or not, control tokens, weights, and what is wrong.

`look` finds the rows and says what the recipe does with each; `terminal` writes them as text, with or without colours,
and `tuner.data.show.page` as one HTML page. A row that the recipe refuses, drops or cuts is shown too, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.data.bound import longest_token
from tuner.data.formats import parser, unread_columns
from tuner.data.render import Renderer
from tuner.data.report import DataReport, listed, place
from tuner.data.show.cells import Cell, CellReader, clean
from tuner.data.source import Row, rows
from tuner.data.stream import choose_template, find_format, make_renderer
from tuner.data.templates import EOS, TEMPLATES, Template, control_ids
from tuner.errors import DataError, RecipeError
from tuner.types import Example, Message, Span, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tuner.recipe import DataSection, DataSource

RAW_LIMIT = 4000  # characters of a row that cannot be rendered
MAX_CHARACTERS = 1_000_000  # of a row that is shown token by token; a cell takes some hundred bytes


@dataclass(frozen=True)
class Section:
    """A run of cells: the whole document (no name), the prompt of a preference, or one of its completions."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(len(c.ids) for c in self.cells if not c.cut)

    @property
    def num_trained(self) -> int:
        """Tokens that are prediction targets with a weight."""
        return sum(len(c.ids) for c in self.cells if c.trained)

    @property
    def num_control(self) -> int:
        """Control tokens that are kept."""
        return sum(c.control for c in self.cells if not c.cut)

    @property
    def num_cut(self) -> int:
        """Tokens that data.max_length takes away."""
        return sum(len(c.ids) for c in self.cells if c.cut)


@dataclass(frozen=True)
class Sample:
    """What the model sees of a row: a document, or a prompt and the completions that continue it."""

    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]  # what its counts are


@dataclass(frozen=True)
class RowView:
    """One row: `problem` says why the recipe does not use it; `raw` is its text where it cannot be rendered."""

    source: str
    row: int  # counted from 0
    facts: tuple[tuple[str, str], ...]
    samples: tuple[Sample, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    raw: str = ""

    @property
    def title(self) -> str:
        """Where it is, for people."""
        return place(self.source, self.row)


@dataclass(frozen=True)
class Look:
    """Rows to show, the ids that end a turn, and what is to be said about all of them."""

    rows: tuple[RowView, ...]
    ends: frozenset[int]
    notes: tuple[str, ...] = ()


def look(
    data: DataSection,
    tokenizer: PreTrainedTokenizerFast,
    *,
    split: str = "train",
    source: int = 1,
    row: int | None = None,
    samples: int = 1,
) -> Look:
    """`samples` rows of a source, from `row` on.

    Args:
        split: `train` or `eval`.
        source: which of the sources of the split, counted from 1.
        row: as in messages: the line of a JSON Lines file, the row of any other, counted from 1. Without it the first
            row that the recipe uses.

    Raises:
        RecipeError: the recipe has no such split or source, or asks for something that its data cannot have.
        DataError: the source cannot be read, or has no such row.
    """
    sources = _sources(data, split)
    if not 1 <= source <= len(sources):
        names = ", ".join(f"{n} {_here(s.path)}" for n, s in enumerate(sources, 1))
        raise RecipeError(f"--source {source}: data.{split} has {len(sources)} of them: {names}")
    template = choose_template(data.train, data, tokenizer)
    chosen = sources[source - 1]
    viewer = _Viewer(data, chosen, tokenizer, make_renderer(data, tokenizer, template))
    facts: tuple[tuple[str, str], ...] = ()
    if len(sources) > 1:
        facts = (("source", f"{source} of {len(sources)} in data.{split}"),)
    views, notes = viewer.views(row, samples)
    if len(views) < samples:
        count = "only 1 row" if len(views) == 1 else f"only {len(views):,} rows"
        notes.append(f"{_here(chosen.path)} has {count} from there on")
    return Look(
        tuple(replace(view, facts=facts + view.facts) for view in views),
        frozenset(viewer.renderer.stop_ids),
        (*notes, *_source_notes(data, chosen, split)),
    )


def _sources(data: DataSection, split: str) -> Sequence[DataSource]:
    if split == "train":
        return data.train
    if split != "eval":
        raise RecipeError(f"--split {split}: a recipe has the splits train and eval")
    if data.eval is None:
        raise RecipeError("--split eval: the recipe has no data.eval; add it, or leave out --split")
    if isinstance(data.eval, float):
        raise RecipeError(
            f"--split eval: data.eval: {data.eval} holds out rows of data.train and has no source of its own; leave "
            "out --split"
        )
    return data.eval


def _source_notes(data: DataSection, source: DataSource, split: str) -> list[str]:
    notes = []
    if source.weight != 1:
        what = "rows are drawn by the seed" if source.weight < 1 else "rows are repeated"
        notes.append(f"weight: {source.weight:g}: {what} until there are {source.weight:g} times as many samples")
    if split == "train" and isinstance(data.eval, float):
        notes.append(f"data.eval: {data.eval} of the samples is held out, by a hash of their ids")
    return notes


@dataclass(frozen=True)
class _Entry:
    """A row of a source, or why it cannot be read."""

    index: int
    row: Row | None
    error: str
    beyond: bool  # after the `limit` of its source


class _Viewer:
    """Renders rows of one source, each by itself: one that the recipe refuses must not hide the others."""

    def __init__(
        self, data: DataSection, source: DataSource, tokenizer: PreTrainedTokenizerFast, renderer: Renderer
    ) -> None:
        self.data, self.source, self.renderer = data, source, renderer
        self.reader = CellReader(tokenizer)
        self.columns = data.columns if source.columns is None else source.columns
        self.detected = find_format(source, data)
        self.parse: Callable[[Row], Example] = parser(self.detected.name, self.columns)
        self.eos = control_ids(tokenizer).get(EOS)

    def views(self, row: int | None, count: int) -> tuple[list[RowView], list[str]]:
        """`count` views from `row` on, or from the first usable row, and what to say about the rows before it."""
        views: list[RowView] = []
        passed: list[RowView] = []
        index = -1
        for entry in self._entries():
            index = entry.index
            if row is not None and index < row - 1:
                continue
            if row is not None and index > row - 1 and not views:
                raise DataError(f"--row {row}: {place(_here(self.source.path), row - 1)} is blank; give another")
            view = self.view(entry)
            if row is None and not views and (view.problem or entry.beyond):
                passed.append(view)
                continue
            views.append(view)
            if len(views) == count:
                break
        if not views and row is not None:
            last = place(_here(self.source.path), index)
            raise DataError(f"--row {row}: there is no such row; the last one is {last}")
        if not views:
            first = passed[0]
            raise DataError(
                f"the recipe uses no row of {_here(self.source.path)}; the first, {first.title}: {first.problem} "
                f"(--row {first.row + 1} shows it)"
            )
        if not passed:
            return views, []
        more = f"{len(passed):,} rows before it are" if len(passed) > 1 else "a row before it is"
        return views, [f"{more} not used; {passed[0].title}: {passed[0].problem}"]

    def _entries(self) -> Iterator[_Entry]:
        bad: list[_Entry] = []
        used = 0

        def unreadable(index: int, error: DataError) -> None:
            bad.append(_Entry(index, None, self._reason(error, index), False))

        for index, row in rows(self.source, on_bad=unreadable):
            yield from bad
            bad.clear()
            used += 1
            yield _Entry(index, row, "", self.source.limit is not None and used > self.source.limit)
        yield from bad

    def _reason(self, error: DataError, index: int) -> str:
        """What an error says, without the place that stands above it anyway."""
        return str(error).removeprefix(place(self.source.path, index)).lstrip(": ")

    def view(self, entry: _Entry) -> RowView:
        """One row, as far as it can be rendered."""
        detected = self.detected
        view = RowView(_here(self.source.path), entry.index, (("format", f"{detected.name} ({detected.reason})"),))
        if entry.row is None:
            return replace(view, problem=entry.error)
        if unread := unread_columns(detected.name, entry.row, self.columns):
            view = replace(view, facts=(*view.facts, ("not read", listed(unread))))
        if entry.beyond:
            view = replace(view, notes=(f"the source has limit: {self.source.limit}, which leaves this row out",))
        try:
            example = replace(self.parse(entry.row), source=self.source.path, row=entry.index)
        except DataError as error:
            raw = json.dumps(entry.row, ensure_ascii=False, indent=2, default=str)
            return replace(view, problem=str(error), raw=_shortened(raw))
        return self._rendered(view, example)

    def _rendered(self, view: RowView, example: Example) -> RowView:
        if (characters := sum(map(len, _texts(example)))) > MAX_CHARACTERS:
            return self._too_long(view, example, characters)
        renderer = self._fresh()
        problem = ""
        try:
            found = renderer.render(example)
        except DataError as error:
            found, problem = [], self._reason(error, example.row)
        whole = found if found and not renderer.report.number("truncated") else self._whole(example)
        if not found and not problem:
            problem = self._why_dropped(renderer.report, whole)
        facts = (*view.facts, *self._template_facts(), ("trained on", self._policy()))
        if example.margin is not None:
            facts = (*facts, ("margin", f"{example.margin:g}"))
        view = replace(view, facts=facts, problem=problem)
        if not whole:
            return replace(view, raw=_shortened(_conversation(example)))
        kept = found or whole
        samples = tuple(self._sample(example, k, w) for k, w in zip(kept, whole, strict=True))
        return replace(view, samples=samples, notes=(*view.notes, *self._notes(renderer.report, samples)))

    def _too_long(self, view: RowView, example: Example, characters: int) -> RowView:
        """A row that is not tokenised, since its cells would take gigabytes: the beginning of its text."""
        note = f"it has {characters:,} characters, and only rows of up to {MAX_CHARACTERS:,} are shown token by token"
        longest = longest_token(self.renderer.tokenizer)
        least = -(-max(map(len, _texts(example))) // longest) if longest else 0
        problem = ""
        if least > self.data.max_length and self.data.overlong in ("error", "drop"):
            limit = f"data.max_length: {self.data.max_length} (data.overlong: {self.data.overlong})"
            problem = f"at least {least:,} tokens, more than {limit}"
        return replace(view, problem=problem, notes=(*view.notes, note), raw=_shortened(_conversation(example)))

    def _fresh(self, **changes: Any) -> Renderer:
        """The renderer with counts of its own; building another one would take its time."""
        renderer = copy.copy(self.renderer)
        renderer.report = DataReport()
        for name, value in changes.items():
            setattr(renderer, name, value)
        return renderer

    def _whole(self, example: Example) -> list[Tokens]:
        """The row as if it were not too long; if it still cannot be used, its tokens with nothing trained; else []."""
        try:
            return self._fresh(max_length=sys.maxsize, overlong="error").render(example)
        except DataError:
            pass
        try:
            free = self._fresh(max_length=sys.maxsize, overlong="error", train_on="all")
            return [_untrained(t) for t in free.render(_neutral(example))]
        except DataError:
            return []

    def _why_dropped(self, report: DataReport, whole: Sequence[Tokens]) -> str:
        length, limit = f"{_longest(whole[0]):,} tokens", f"data.max_length: {self.data.max_length}"
        if report.number("cut_away"):
            return f"dropped: {limit} leaves nothing to train on of {length} (data.overlong: truncate)"
        return f"dropped: {length}, more than {limit} (data.overlong: drop)"

    def _policy(self) -> str:
        return self.data.train_on + (", with ghost attention" if self.data.ghost_attention else "")

    def _template_facts(self) -> list[tuple[str, str]]:
        template = self.renderer.template
        if template is None:
            return [("template", "none (raw text)")]
        options = _options(template)
        date = options.pop("date_string", None)
        shown = template.name + "".join(f", {name}: {value}" for name, value in options.items())
        shown += "".join(f", {name} is {slot}" for name, slot in template.renamed.items())
        return [("template", shown), ("date_string", "the template writes no date" if date is None else str(date))]

    def _sample(self, example: Example, kept: Tokens, whole: Tokens) -> Sample:
        trunk = self._cells(kept.trunk, whole.trunk, 0)
        start = sum(len(c.ids) for c in trunk)
        names = _branch_names(example) if whole.branches else []
        sections = [Section("prompt" if whole.branches else "", trunk)]
        for name, now, before in zip(names, kept.branches or ((),) * len(names), whole.branches, strict=True):
            sections.append(Section(name, self._cells(now, before, start)))
        return Sample(tuple(sections), tuple(self._counts(sections, kept)))

    def _cells(self, kept: Sequence[Span], whole: Sequence[Span], start: int) -> tuple[Cell, ...]:
        length = sum(len(s.ids) for s in kept)
        lost = self.reader.cells(_after(whole, length), start + length, cut=True)
        return (*self.reader.cells(kept, start), *lost)

    def _counts(self, sections: Sequence[Section], kept: Tokens) -> Iterator[tuple[str, str]]:
        tokens, trained = sum(s.num_tokens for s in sections), sum(s.num_trained for s in sections)
        room = f"at most {self.data.max_length:,}"
        if len(sections) == 1:
            yield "tokens", f"{tokens:,} of {room}"
        else:
            parts = ", ".join(f"{s.name} {s.num_tokens:,}" for s in sections)
            yield "tokens", f"{tokens:,} ({parts}); prompt and longest completion {_longest(kept):,} of {room}"
        yield "trained", f"{trained:,} ({100 * trained / max(tokens, 1):.1f}%)"
        yield "control", f"{sum(s.num_control for s in sections):,}"
        if cut := sum(s.num_cut for s in sections):
            yield "cut", f"{cut:,}"
        weights = sorted({c.weight for s in sections for c in s.cells if c.trained})
        if weights and weights != [1.0]:
            yield "weights", ", ".join(f"{w:g}" for w in weights)
        yield "terminator", self._terminator(sections)

    def _ends(self) -> tuple[int, ...]:
        eos = () if self.eos is None else (self.eos,)
        return self.renderer.terminator_ids or eos

    def _terminator(self, sections: Sequence[Section]) -> str:
        ends = self._ends()
        found = [c for s in sections for c in s.cells if c.ids[0] in ends and not c.cut]
        names = ", ".join(f"{self.reader.name(i)} (id {i})" for i in ends)
        return f"{names}; {len(found)} here, {sum(c.trained for c in found)} trained"

    def _notes(self, report: DataReport, samples: Sequence[Sample]) -> Iterator[str]:
        limit = f"data.max_length: {self.data.max_length}"
        if report.number("truncated"):
            yield f"cut at {limit} (data.overlong: truncate); what is lost is shown as cut"
        if report.number("split"):
            yield f"split into {len(samples)} pieces by {limit} (data.overlong: split)"
        if report.number("control_text"):
            yield "the text spells out control tokens; they stay text and are no control tokens here"
        if report.number("empty_answers"):
            yield "a trained answer is empty"
        ends = self._ends()
        targets = [s for sample in samples[-1:] for s in sample.sections if s.num_trained]
        if any(not any(c.trained and c.ids[0] in ends for c in s.cells) for s in targets):
            yield "no terminator is trained at the end of an answer, so this row does not teach the model to stop"


def _branch_names(example: Example) -> list[str]:
    if example.label is not None:
        names = [f"completion (label: {str(example.label).lower()})"]
    elif len(example.completions) == 2:
        names = ["chosen", "rejected"]
    else:
        names = [f"rank {n}" for n in range(1, len(example.completions) + 1)]
    scores = example.scores or (None,) * len(names)
    return [n if s is None else f"{n} (score {s:g})" for n, s in zip(names, scores, strict=True)]


def _options(template: Template) -> dict[str, Any]:
    """The options of a template as they are in force."""
    known = TEMPLATES.get(template.name, template).pieces
    parameters = inspect.signature(known).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "tools"}
    return {**defaults, **template.options}


def _longest(sample: Tokens) -> int:
    """Tokens of the trunk and its longest branch, which is what data.max_length bounds."""
    runs = [sum(len(s.ids) for s in spans) for spans in (sample.trunk, *sample.branches)]
    return runs[0] + max(runs[1:], default=0)


def _after(spans: Sequence[Span], length: int) -> list[Span]:
    """The spans without their first `length` tokens."""
    out = []
    for span in spans:
        out.append(replace(span, ids=span.ids[length:]))
        length = max(0, length - len(span.ids))
    return out


def _untrained(sample: Tokens) -> Tokens:
    def off(spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(replace(s, trained=False) for s in spans)

    return replace(sample, trunk=off(sample.trunk), branches=tuple(map(off, sample.branches)))


def _neutral(example: Example) -> Example:
    """The example without what its messages say about training."""

    def plain(messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(replace(m, train=None, weight=1.0) for m in messages)

    return replace(example, prompt=plain(example.prompt), completions=tuple(map(plain, example.completions)))


def _conversation(example: Example) -> str:
    turns = [*example.prompt, *(m for completion in example.completions for m in completion)]
    return "\n\n".join(f"[{m.role}]\n{m.content}" for m in turns)


def _texts(example: Example) -> list[str]:
    return [m.content for turns in (example.prompt, *example.completions) for m in turns]


def _shortened(text: str) -> str:
    if len(text) <= RAW_LIMIT:
        return text
    return text[:RAW_LIMIT] + f"\n... and {len(text) - RAW_LIMIT:,} more characters"


def _here(path: str) -> str:
    """A path as it is seen from the current directory, on one line."""
    return clean(path.removeprefix(f"{Path.cwd()}{os.sep}"))
