"""Sources -> findings row by row, and a ledger: the few numbers of each row that comparing rows needs later.

A row costs about 50 bytes of the ledger, and 64 more where near-duplicates are looked for; its text is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.data.check import content, similar
from tuner.data.check.findings import Findings
from tuner.data.fit import Fit
from tuner.data.formats import FORMATS, Detected, parser
from tuner.data.render import Renderer
from tuner.data.report import place
from tuner.data.source import rows
from tuner.data.stream import find_format, walk
from tuner.data.templates import tojson
from tuner.errors import DataError
from tuner.types import Example, Message, Span, Tokens

if TYPE_CHECKING:
    from tuner.recipe import DataSection, DataSource


@dataclass
class Ledger:
    """What is kept of the rows of one side (train or eval), in the order of the sources."""

    sources: Sequence[DataSource]
    detected: list[Detected] = field(default_factory=list)
    rows_read: list[int] = field(default_factory=list)  # of each source
    first_sample: list[int] = field(default_factory=lambda: [0])  # of each source, and where the last one ends
    unread_columns: dict[str, int] = field(default_factory=dict)
    chats: int = 0  # that can be used
    some_end: bool = False  # whether a terminator is trained in any of them

    # of each row that has a shape
    source: array[int] = field(default_factory=lambda: array("H"))
    row: array[int] = field(default_factory=lambda: array("q"))
    key: array[int] = field(default_factory=lambda: array("Q"))  # of all its text
    prompt: array[int] = field(default_factory=lambda: array("Q"))  # of its prompt; 0 if it has none
    script: array[int] = field(default_factory=lambda: array("B"))
    length: array[int] = field(default_factory=lambda: array("q"))  # tokens before any cut; 0 if it cannot be used
    bands: bytearray = field(default_factory=bytearray)  # uint32 [BANDS] of each

    # of each sample
    owner: array[int] = field(default_factory=lambda: array("q"))  # its row, as an index into the above
    tokens: array[int] = field(default_factory=lambda: array("q"))
    trained: array[int] = field(default_factory=lambda: array("q"))
    pair: array[int] = field(default_factory=lambda: array("B"))  # 0: none, 1: a pair without a margin, 2: with one
    digest: array[int] = field(default_factory=lambda: array("Q"))  # the first 8 bytes of sha256 over its ids

    # of preferences, in tokens
    chosen: array[int] = field(default_factory=lambda: array("q"))  # of each comparison, the one that is preferred
    rejected: array[int] = field(default_factory=lambda: array("q"))
    good: array[int] = field(default_factory=lambda: array("q"))  # of unpaired answers
    bad: array[int] = field(default_factory=lambda: array("q"))

    def where(self, index: int) -> tuple[str, int]:
        """Source and 0-based row number of a row of the ledger."""
        return self.sources[self.source[index]].path, self.row[index]

    def column(self, name: str) -> np.ndarray:
        """A column as an array."""
        values: array[int] = getattr(self, name)
        return np.frombuffer(values, values.typecode) if values else np.empty(0, values.typecode)

    def band_matrix(self) -> np.ndarray:
        """uint32 [rows, BANDS]."""
        return np.frombuffer(self.bands, np.uint32).reshape(-1, similar.BANDS)


@dataclass(frozen=True)
class Scanner:
    """What it takes to look at rows.

    Args:
        data: the data section, made lenient: bad rows are reported and passed over.
        whole: renders rows uncut, and drops those of more than its max_length, which are too many tokens to handle.
        fitted: renders by data.max_length and data.overlong.
        accepts: the kinds of rows that the stage can use.
        fit: what its loss reads of each of them.
        near: whether near-duplicates will be looked for.
        digests: whether a part of the samples is to be held out by their hashes.
    """

    data: DataSection
    whole: Renderer
    fitted: Renderer
    findings: Findings
    accepts: Collection[str]
    fit: Fit | None
    near: bool
    digests: bool

    def scan(self, sources: Sequence[DataSource]) -> Ledger:
        """Every row of the sources, one after another.

        Raises:
            DataError: a source cannot be read, or none of its rows has a format.
            RecipeError: the recipe asks for something that its data cannot have.
        """
        ledger = Ledger(sources)
        for number, source in enumerate(sources):
            ledger.detected.append(find_format(source, self.data))
            report = self.whole.report
            before, unread = report.rows_read, report.unread_columns.copy()

            broken: set[int] = set()  # of the rows at hand

            def bad(index: int, error: DataError, path: str = source.path, broken: set[int] = broken) -> None:
                self.findings.add(error.kind, path, index, str(error).removeprefix(f"{place(path, index)}: "))
                broken.add(index)

            for example, samples in walk(source, ledger.detected[-1], self.data, self.whole, bad):
                if not ledger.row or ledger.source[-1] != number:
                    self._check_recipe(example)
                self._look(example, samples, ledger, number, broken)
                broken.discard(example.row)
            ledger.rows_read.append(report.rows_read - before)
            self._check_kind(source.path, ledger.detected[-1].name, ledger.rows_read[-1])
            ledger.first_sample.append(len(ledger.owner))
            for name, count in (report.unread_columns - unread).items():
                ledger.unread_columns[name] = ledger.unread_columns.get(name, 0) + count
        return ledger

    def _check_recipe(self, example: Example) -> None:
        """Lets through what training would say about the recipe, whatever row it met first."""
        with contextlib.suppress(DataError):
            self.fitted.check(example)

    def _check_kind(self, path: str, name: str, rows_read: int) -> None:
        if (kind := FORMATS.get(name).kind) not in self.accepts:
            found = self.findings.get("wrong_kind")
            found.count += rows_read
            found.detail = found.detail or f"{path} is {kind} data, and the stage trains on {' or '.join(self.accepts)}"

    def _look(
        self, example: Example, samples: list[Tokens], ledger: Ledger, number: int, broken: Collection[int]
    ) -> None:
        def found(kind: str, detail: str = "") -> None:
            self.findings.add(kind, example.source, example.row, detail)

        usable = example.row not in broken  # else what is wrong with it has been said
        self._look_at_text(example, usable, found)
        text = all_text(example)
        ledger.source.append(number)
        ledger.row.append(example.row)
        ledger.key.append(similar.key(_parts(example)))
        ledger.prompt.append(similar.key(map(_part, example.prompt)) if _has_prompt(example) else 0)
        ledger.script.append(content.script(text))
        if self.near:
            ledger.bands.extend(similar.bands(similar.normalised(text)).tobytes())
        if not usable:
            ledger.length.append(0)
            return
        length = longest(samples[0]) if samples else self.whole.max_length
        ledger.length.append(length)
        if samples:
            _compare_lengths(example, samples[0], ledger)
        cut = length > self.data.max_length or not samples
        if cut:
            found("too_long", f"{length:,} tokens" if samples else f"more than {length:,} tokens")
            samples = self._cut(example, found)
        if fault := next(filter(None, (self._fault(one) for one in samples)), ""):
            found("unfit", fault.removeprefix("the row "))
            samples = []
        taught = self.data.train_control_tokens and not content.is_text(example)
        ends = self.whole.terminator_ids if taught else ()
        ledger.chats += bool(ends and samples)
        ledger.some_end = ledger.some_end or any(np.isin(run, ends).any() for s in samples for run in _trained(s))
        self._look_at_ids(samples, ends, cut, found)
        for one in samples:
            ledger.owner.append(len(ledger.row) - 1)
            ledger.tokens.append(len(one))
            ledger.trained.append(one.num_trained)
            ledger.pair.append(0 if len(one.branches) != 2 else 2 if one.scores else 1)
            if self.digests:
                ledger.digest.append(int.from_bytes(hashlib.sha256(_ids(one).astype("<i4").tobytes()).digest()[:8]))

    def _cut(self, example: Example, found: Callable[..., None]) -> list[Tokens]:
        """A row that is too long, as data.overlong leaves it."""
        equal = self.fitted.report.number("cut_equal")
        samples = self.fitted.render(example)
        if self.fitted.report.number("cut_equal") > equal:
            found("cut_equal")
        elif not samples and self.data.overlong == "truncate":
            found("nothing_to_train", "its answer begins beyond data.max_length")
        return samples

    def _fault(self, sample: Tokens) -> str:
        return self.fit.fault(sample) if self.fit else ""

    def _look_at_text(self, example: Example, usable: bool, found: Callable[..., None]) -> None:
        if self.whole.spells_control(example):
            found("control_text")
        if not example.is_preference and content.empty_answer(example):
            found("empty_answer")
        if content.empty_turn(example):
            found("empty_turn")
        if usable and content.blank_difference(example):
            found("blank_difference")
        if sign := next(filter(None, (content.encoding(m.content) for m in content.messages(example))), ""):
            found("encoding", sign)
        if not content.is_text(example):
            orders = (content.role_order((*example.prompt, *c)) for c in example.completions)
            if odd := next(filter(None, orders), ""):
                found("role_order", odd)

    def _look_at_ids(
        self, samples: Sequence[Tokens], ends: Sequence[int], cut: bool, found: Callable[..., None]
    ) -> None:
        bos = self.whole.tokenizer.bos_token_id
        faults = [bos_fault(sample, bos) for sample in samples]
        if fault := next(filter(None, faults), ""):
            found(fault)
        if self.data.train_on == "all":
            # every token is trained, also what comes after a terminator
            late = cut and any(int(run[-1]) not in ends for s in samples for run in _runs(s))
            lacks = any(not np.isin(_ids(s), ends).any() for s in samples)
            missing = bool(ends) and (late or lacks)
        else:
            missing = any(lacks_terminator(sample, ends) for sample in samples)
        if missing:
            found("terminator_missing")


def bos_fault(sample: Tokens, bos: int | None) -> str:
    """`bos_missing` or `bos_doubled` where a document does not begin with exactly one BOS; else empty.

    A template may have more of them further on (Llama 2 has one before every user turn), but never two in a row.
    """
    if bos is None:
        return ""
    documents = (sample.trunk,) if any(len(s.ids) for s in sample.trunk) else sample.branches
    for spans in documents:
        first = next((s for s in spans if len(s.ids)), None)
        if first is None or int(first.ids[0]) != bos:
            return "bos_missing"
    ids = _ids(sample)
    return "bos_doubled" if bool(((ids[1:] == bos) & (ids[:-1] == bos)).any()) else ""


def lacks_terminator(sample: Tokens, ends: Sequence[int]) -> bool:
    """Whether a run of trained tokens, which is an answer, ends in anything but a terminator."""
    return bool(ends) and any(int(run[-1]) not in ends for run in _runs(sample))


def longest(sample: Tokens) -> int:
    """Tokens of the trunk with its longest branch: what data.max_length bounds."""
    return _size(sample.trunk) + max(map(_size, sample.branches), default=0)


def shingles_of(ledger: Ledger, data: DataSection, wanted: Iterable[int]) -> dict[int, np.ndarray]:
    """The shingles of some rows of a ledger, which are read once more for it."""
    numbers = {ledger.where(i)[1] + (ledger.source[i] << 48): i for i in wanted}
    out: dict[int, np.ndarray] = {}
    for n, (source, detected) in enumerate(zip(ledger.sources, ledger.detected, strict=True)):
        if not any(number >> 48 == n for number in numbers):
            continue
        parse = parser(detected.name, data.columns if source.columns is None else source.columns)
        for index, row in itertools.islice(rows(source, on_bad=lambda *_: None), source.limit):
            if (i := numbers.get(index + (n << 48))) is not None:
                out[i] = similar.shingles(similar.normalised(all_text(parse(row))))
    return out


def all_text(example: Example) -> str:
    """All that an example says, a message a line."""
    return "\n".join(m.content for m in content.messages(example))


def _compare_lengths(example: Example, sample: Tokens, ledger: Ledger) -> None:
    sizes = [_size(branch) for branch in sample.branches]
    for better, worse in itertools.combinations(sizes, 2):  # the best comes first
        ledger.chosen.append(better)
        ledger.rejected.append(worse)
    if example.label is not None and sizes:
        (ledger.good if example.label else ledger.bad).append(sizes[0])


def _part(message: Message) -> str:
    calls: list[Mapping[str, Any]] = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
    return f"{message.role}\n{similar.normalised(message.content)}" + (f"\n{tojson(calls)}" if calls else "")


def _parts(example: Example) -> Iterator[str]:
    for turns in (example.prompt, *example.completions):
        yield str(len(turns))
        yield from map(_part, turns)
    yield str(example.label)


def _has_prompt(example: Example) -> bool:
    return any(m.role != "system" and m.content.strip() for m in example.prompt)


def _size(spans: Sequence[Span]) -> int:
    return sum(len(s.ids) for s in spans)


def _ids(sample: Tokens) -> np.ndarray:
    parts = [s.ids for spans in (sample.trunk, *sample.branches) for s in spans]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _trained(sample: Tokens) -> Iterator[np.ndarray]:
    return (s.ids for spans in (sample.trunk, *sample.branches) for s in spans if s.trained and s.weight)


def _runs(sample: Tokens) -> Iterator[np.ndarray]:
    """The last span of every run of trained spans."""
    for spans in (sample.trunk, *sample.branches):
        for span, after in itertools.zip_longest(spans, spans[1:]):
            if span.trained and span.weight and len(span.ids) and not (after is not None and after.trained):
                yield span.ids
