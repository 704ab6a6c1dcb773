"""Sources -> one split of samples, and held-out samples."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.data import cache
from tuner.data.fit import Fit
from tuner.data.formats import FORMATS, Detected, detect, parser, unread_columns
from tuner.data.render import Renderer
from tuner.data.report import MAX_PLACES, DataReport, place
from tuner.data.resolve import resolve_template
from tuner.data.source import content_hash as content_hash_of_source
from tuner.data.source import kind_of_file, local_path, rows, stamp
from tuner.data.store import StoreBuilder, TokenStore
from tuner.data.templates import Template
from tuner.errors import DataError, RecipeError
from tuner.types import Example, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tuner.recipe import DataSection, DataSource

CHUNK = 1024  # rows tokenised at once: enough for the tokenizer's batch, little memory


@dataclass(frozen=True, eq=False)
class Split:
    """Rendered samples in the order of their sources, what happened to the rows, a hash of ids, masks and weights."""

    tokens: TokenStore
    report: DataReport
    hash: str


def choose_template(
    sources: Sequence[DataSource], data: DataSection, tokenizer: PreTrainedTokenizerFast
) -> Template | None:
    """The chat template of a recipe; None where `chat_template: auto` meets nothing but raw text, which needs none.

    Raises:
        RecipeError, ModelError: as `resolve_template`; or there is none, and the recipe sets something about it.
    """
    if data.chat_template == "auto" and all(find_format(source, data).name == "text" for source in sources):
        about = {
            "date_string": data.date_string,
            "template_options": data.template_options,
            "control_tokens": data.control_tokens,
        }
        for key in (key for key, value in about.items() if value):
            raise RecipeError(
                f"data.{key} has no effect: all of data.train is raw text, which no template wraps; remove it, or name "
                "a data.chat_template to save with the result"
            )
        return None
    options = dict(data.template_options) | ({} if data.date_string is None else {"date_string": data.date_string})
    return resolve_template(data.chat_template, tokenizer, options, data.control_tokens)


def make_renderer(data: DataSection, tokenizer: PreTrainedTokenizerFast, template: Template | None) -> Renderer:
    """The renderer that a recipe asks for."""
    return Renderer(
        tokenizer,
        template,
        data.train_on,
        data.max_length,
        data.overlong,
        data.parse_control_tokens,
        data.ghost_attention,
        data.train_control_tokens,
    )


def load_split(
    sources: Sequence[DataSource],
    data: DataSection,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None,
    *,
    seed: int = 0,
    accepts: Sequence[str] = ("chat", "text"),
    fit: Fit | None = None,
) -> Split:
    """Reads, renders and counts every row of `sources`, or takes their tokens from the cache (`data.cache`).

    Args:
        seed: picks the rows of a source with a fractional weight.
        accepts: the kinds of data that the stage can use: `chat`, `text`, `preference`.
        fit: what its loss reads of every row, which `data.on_bad_row` then decides about.

    Raises:
        DataError: a source or row is unusable or of another kind, or nothing is left to train on.
        RecipeError: the recipe asks for something that its data cannot have.
    """
    renderer = make_renderer(data, tokenizer, template)
    common = cache.identity(data, tokenizer, template) if data.cache else {}
    report, parts, orders = DataReport(), list[cache.Part](), list[np.ndarray]()
    for number, source in enumerate(sources):
        part = _part(source, data, renderer, common, accepts)
        first = sum(len(p.block) for p in parts)
        parts.append(part)
        report.merge(part.report)
        usable = _fitting(TokenStore([part.block]), fit, data, report)
        orders.append(first + usable[_sample(TokenStore([part.block], usable), source, report, [seed, number])])
    names = ", ".join(s.path for s in sources)
    store = TokenStore([part.block for part in parts], np.concatenate([np.empty(0, np.int64), *orders]))
    if not len(store):
        lost = "; ".join(report.lines()[len(sources) :]) or "no sources"
        raise DataError(f"no usable rows in {names}: {lost}")
    chats, ends = any(part.num_chats for part in parts), renderer.terminator_ids
    if data.train_control_tokens and chats and not any(part.block.trains_any(ends) for part in parts):
        raise DataError(
            f"no trained answer in {names} has its terminator ({', '.join(template.terminators if template else ())}), "
            "so the model would never learn to stop; raise data.max_length, or use another data.chat_template"
        )
    report.measure(store)
    return Split(store, report, store.content_hash())


def find_format(source: DataSource, data: DataSection) -> Detected:
    """The format of a source: as the recipe says, or as its first readable row shows."""
    name = source.format or data.format
    if name != "auto":
        return Detected(name, "as the recipe says")
    columns = data.columns if source.columns is None else source.columns
    first: DataError | None = None

    def note(index: int, error: DataError) -> None:
        nonlocal first
        first = first or error
        if data.on_bad_row != "skip":
            raise _counted(error, *_usable(source, lambda row, _: detect(row, columns)))

    for index, row in rows(source, on_bad=note):
        try:
            return detect(row, columns)
        except DataError as error:
            note(index, DataError(f"{place(source.path, index)}: {error}", error.kind))
    raise first or DataError(f"{source.path} holds no readable row; give a file with one JSON object for each row")


def walk(
    source: DataSource,
    detected: Detected,
    data: DataSection,
    renderer: Renderer,
    on_bad: Callable[[int, DataError], None],
) -> Iterator[tuple[Example, list[Tokens]]]:
    """Every row of a source as an example, with its samples (none where it was dropped), in the order of the file.

    `on_bad` is told of each row that cannot be used, with its number, and may raise; the row is then passed over.
    """
    columns = data.columns if source.columns is None else source.columns
    parse, report = parser(detected.name, columns), renderer.report

    def unreadable(index: int, error: DataError) -> None:
        report.rows_read += 1
        on_bad(index, error)

    def examples() -> Iterator[Example]:
        for index, row in itertools.islice(rows(source, on_bad=unreadable), source.limit):
            report.rows_read += 1
            report.unread_columns.update(unread_columns(detected.name, row, columns))
            try:
                yield replace(parse(row), source=source.path, row=index)
            except DataError as error:
                on_bad(index, DataError(f"{place(source.path, index)}: {error}", error.kind))

    for chunk in _chunks(examples(), CHUNK):
        yield from zip(chunk, renderer.render_batch(chunk, lambda e, error: on_bad(e.row, error)), strict=True)


def _part(
    source: DataSource, data: DataSection, renderer: Renderer, common: dict[str, Any], accepts: Sequence[str]
) -> cache.Part:
    """The samples of a source, from the cache if they are there, and into it if not."""

    def check_kind(name: str) -> None:
        kind = FORMATS.get(name).kind
        if kind not in accepts:
            raise DataError(
                f"{source.path} is of the format '{name}', which is {kind} data, and this stage trains on "
                f"{' or '.join(accepts)} data; name another file, or set data.format to a format of that kind"
            )

    @_without_collector()
    def render(builder: StoreBuilder) -> tuple[DataReport, str, int]:
        detected = find_format(source, data)
        check_kind(detected.name)
        renderer.report, renderer.num_chats = DataReport(), 0
        commit = "" if local_path(source) else f"@{content}"
        renderer.report.sources.append(f"{source.path}{commit}: {detected.name} ({detected.reason})")
        for some in rendered(source, detected, data, renderer):
            builder.add([sample for _, samples in some for sample in samples])
        return renderer.report, detected.name, renderer.num_chats

    before = stamp(source)
    content = content_hash_of_source(source) if data.cache or before is None else ""

    def render_unmoved(builder: StoreBuilder) -> tuple[DataReport, str, int]:
        found = render(builder)
        if stamp(source) != before:  # and so its hash is that of something else
            raise DataError(f"{source.path} was changed while it was read; start again when nothing writes to it")
        return found

    notes = []
    if data.cache:
        key = cache.entry_key(common, source, content, kind_of_file(source))
        if part := cache.find(key, source.path):
            check_kind(part.format)
            return part
        try:
            return cache.keep(key, source.path, render_unmoved)
        except cache.Unwritable as error:
            notes.append(f"warning: the tokens of {source.path} are not kept for the next time ({error})")
    builder = StoreBuilder()
    report, name, num_chats = render_unmoved(builder)
    report.notes += notes
    return cache.Part(builder.finish(), report, name, num_chats)


def _fitting(tokens: TokenStore, fit: Fit | None, data: DataSection, report: DataReport) -> np.ndarray:
    """The indices of the samples that the loss can use; the others are counted, or the end."""
    faults = list(fit.faults(tokens)) if fit else []
    if not faults:
        return np.arange(len(tokens))
    left = np.setdiff1d(np.arange(len(tokens)), np.concatenate([at for at, _ in faults]))
    at, said = min(faults, key=lambda fault: int(fault[0][0]))
    if data.on_bad_row != "skip":
        error = DataError(f"{place(*tokens.origin(int(at[0])))}: {said}")
        raise _counted(error, len(left), len(tokens)) if len(left) else error
    lost = np.sort(np.concatenate([at for at, _ in faults]))
    report.count_many("unfit", _places(tokens, lost), len(lost))
    report.counts["unfit"].reason = report.counts["unfit"].reason or said
    return left


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without searches for cycles of garbage: rendering makes none, and each search walks all that the process holds.

    Measured on 7,000 chats: a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def rendered(
    source: DataSource, detected: Detected, data: DataSection, renderer: Renderer
) -> Iterator[list[tuple[Example, list[Tokens]]]]:
    """What `walk` gives, some rows at a time. A row that cannot be used is counted, or the end, as the recipe says.

    Raises:
        DataError: such a row, with its place and with how many others could be used.
    """

    def skip(index: int, error: DataError) -> None:
        if data.on_bad_row != "skip":
            raise _BadRow(error)
        where = place(source.path, index)
        renderer.report.count("skipped", where, str(error).removeprefix(f"{where}: "))

    try:
        found = walk(source, detected, data, renderer, skip)
        while some := list(itertools.islice(found, CHUNK)):
            yield some
    except _BadRow as bad:
        parse = parser(detected.name, data.columns if source.columns is None else source.columns)

        def check(row: dict[str, Any], index: int) -> None:
            renderer.check(replace(parse(row), source=source.path, row=index))

        raise _counted(bad.error, *_usable(source, check)) from None


class _BadRow(Exception):
    """A row that ends the reading, on its way through those who would catch a DataError."""

    def __init__(self, error: DataError) -> None:
        super().__init__(str(error))
        self.error = error


def _usable(source: DataSource, check: Callable[[dict[str, Any], int], object]) -> tuple[int, int]:
    """How many rows of a source pass `check`, and how many there are; as far as it can be read."""
    good = total = 0

    def unreadable(*_: object) -> None:
        nonlocal total
        total += 1

    try:
        for index, row in itertools.islice(rows(source, on_bad=unreadable), source.limit):
            total += 1
            try:
                check(row, index)
            except DataError:
                continue
            good += 1
    except DataError:
        pass  # the file ends here; the error at hand is of an earlier row
    return good, total


def _counted(error: DataError, good: int, total: int) -> DataError:
    """The error, with what skipping such rows would leave."""
    left = f"{good:,} of {total:,} rows could be used (data.on_bad_row: skip)"
    return DataError(f"{error}; {left}", error.kind)


def _chunks(items: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def sampled(n: int, weight: float, seed: list[int]) -> np.ndarray:
    """`weight` as a sampling ratio: 2.0 is every sample twice, 0.5 a seeded half, 1.5 all and a seeded half again.

    Returns the indices of what is used of `n` samples, in order: int64 [samples used].
    """
    whole, part = divmod(weight, 1.0)
    chosen = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(n)[: round(part * n)])
    return np.concatenate([np.tile(np.arange(n), int(whole)), chosen])


def _sample(tokens: TokenStore, source: DataSource, report: DataReport, seed: list[int]) -> np.ndarray:
    """The indices of what the weight of a source leaves (`sampled`); counts what it leaves out or repeats."""
    n, out = len(tokens), sampled(len(tokens), source.weight, seed)
    if len(out) < n:
        left = np.setdiff1d(np.arange(n), out)
        report.count_many("not_sampled", _places(tokens, left), len(left))
    elif len(out) > n:
        report.count("repeated", source.path, times=len(out) - n)
    return out


def _places(tokens: TokenStore, indices: np.ndarray) -> Iterator[str]:
    """Where the first of the samples at `indices` come from."""
    return (place(*tokens.origin(int(i))) for i in indices[:MAX_PLACES])


def content_hash(tokens: Iterable[Tokens]) -> str:
    """sha256 over ids, masks and weights, in order."""
    return TokenStore.of(tokens).content_hash()


def holdout(split: Split, fraction: float) -> tuple[Split, Split]:
    """Splits off about `fraction` of the samples for evaluation: those with the smallest hashes of their ids.

    Samples with equal ids always land on one side, and the choice depends on nothing but the ids.

    Raises:
        DataError: there are not two different samples to divide.
    """
    held = held_out(split.tokens.keys(), fraction)
    train, evaluation = split.report.copy(), DataReport(sources=[f"held out by content hash: {fraction}"])
    parts = [split.tokens.take(np.flatnonzero(side)) for side in (~held, held)]
    train.count_many("held_out", _places(split.tokens, np.flatnonzero(held)), len(parts[1]))
    train.measure(parts[0])
    evaluation.measure(parts[1])
    evaluation.rows_read = len(parts[1])
    return Split(parts[0], train, parts[0].content_hash()), Split(parts[1], evaluation, parts[1].content_hash())


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples `holdout` holds out, by their keys (`TokenStore.keys`): bool [samples]."""
    assert 0 < fraction < 1
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise DataError(f"data.eval: {fraction} cannot hold out a part of {len(distinct)} distinct row; add rows")
    number = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return keys <= distinct[number - 1]
