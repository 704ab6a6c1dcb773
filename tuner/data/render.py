"""Example -> Tokens: the pieces of its chat become ids, of which each is trained or not."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tuner.data.bound import longest_token
from tuner.data.encode import Lead, TextEncoder
from tuner.data.mask import Mask, Masked, Target, TrainOn, is_text, same_answers
from tuner.data.report import DataReport, place
from tuner.data.templates import BOS, EOS, TEMPLATES, Template, control_ids, tojson
from tuner.errors import DataError, ModelError, RecipeError
from tuner.types import ANSWERS, Example, Message, Span, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Overlong = Literal["error", "drop", "truncate", "split"]
OnBad = Callable[[Example, DataError], None]
Weighted = tuple[list[int], float]  # ids, and their weight as targets


class Renderer:
    """Renders examples with one template and one masking policy.

    Args:
        tokenizer: a fast tokenizer with a BOS.
        template: of chats; None if there is only raw text.
        train_on: `assistant` (every answer and its terminator), `last` (the last one), `all` (everything but BOS).
        max_length: of a document, in tokens.
        overlong: what happens to a longer one.
        parse_control_tokens: whether raw text may hold control tokens, as pre-templated files do.
        ghost_attention: whether a system instruction is to reach through all turns (see `tuner.data.ghost`).
        train_control_tokens: whether control tokens of compared answers are trained, as their text is.

    Raises:
        ModelError: the tokenizer is slow, or lacks BOS or a control token of the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template | None,
        train_on: TrainOn = "assistant",
        max_length: int = 2048,
        overlong: Overlong = "error",
        parse_control_tokens: bool = False,
        ghost_attention: bool = False,
        train_control_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self.max_length, self.overlong, self.parse_control_tokens = max_length, overlong, parse_control_tokens
        self.report = DataReport()
        self.num_chats = 0
        self._encoder = TextEncoder(tokenizer)
        self._longest = longest_token(tokenizer)
        self._control = control_ids(tokenizer)
        terminators = template.terminators if template else ()
        for name in template.control if template else (BOS, EOS):
            self._id(name)
        self._mask = Mask(tokenizer, template, train_on, ghost_attention, train_control_tokens)
        self.terminator_ids = tuple(dict.fromkeys(self._control[n] for n in terminators if n in self._control))
        ends = [*self.terminator_ids, *([self._control[EOS]] if EOS in self._control else [])]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        # special tokens, and those of the template, which need not be special
        own = {*template.control, *template.optional, *template.tags} if template else set()
        added = tokenizer.added_tokens_decoder.values()
        spelled = sorted((t.content for t in added if t.special or t.content in own), key=len, reverse=True)
        self._begins = os.path.commonprefix(spelled)  # a quick look for this spares most texts the search
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    def render(self, example: Example) -> list[Tokens]:
        """The samples of one example: none if it was dropped (and counted), several if raw text was split.

        Raises:
            DataError: nothing to train on, a role that the template has no place for, or too long; names the row.
            RecipeError: the recipe asks for something that this kind of example cannot have.
        """
        return self.render_batch([example])[0]

    def render_batch(self, examples: Sequence[Example], on_bad: OnBad | None = None) -> list[list[Tokens]]:
        """The samples of each example, all tokenised in one go.

        `on_bad` is told of an example that cannot be used, which then has no samples; without it that is an error. A
        document that is too long is no such example: `overlong` decides about it.
        """
        plans: list[Masked | None] = []
        for example in examples:
            try:
                masked = self._masked(example)
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(example, error)
                plans.append(None)
                continue
            self._count(masked)
            plans.append(None if self._hopeless(masked) else masked)
        texts = [p.example.completions[0][0].content for p in plans if p and p.is_text]
        documents = iter(self._encoder.parsed(texts) if self.parse_control_tokens else self._encoder.document(texts))
        ids = self._encoder.texts(
            text for p in plans if p and not p.is_text for branch in p.branches for text in _texts(branch)
        )
        out: list[list[Tokens]] = []
        for example, plan in zip(examples, plans, strict=True):
            if plan is None:
                out.append([])
                continue
            try:
                if plan.is_text:
                    parts = self._text_parts(example, next(documents), plan.branches[0][0][1])
                    out.append(self._fit_document(parts, example))
                elif example.is_preference:
                    out.append(self._fit_branches(plan, ids))
                else:
                    out.append(self._fit_document(self._chat_parts(plan.branches[0], ids), example))
            except _Unusable as error:
                if on_bad is None:
                    raise
                on_bad(example, error)
                out.append([])
        return out

    def check(self, example: Example) -> None:
        """Raises the DataError of an example that cannot be rendered, as far as that shows without tokenising it."""
        self._masked(example)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids to generate an answer from: BOS, the messages, the header of an answer. For a `text` message: BOS and
        the text."""
        if len(messages) == 1 and messages[0].role == "text":
            return [self._id(BOS), *self._encoder.document([messages[0].content])[0]]
        plan = self._mask.prompt(messages, tools)
        return [i for ids, _ in self._chat_parts(plan, self._encoder.texts(_texts(plan))) for i in ids]

    def spells_control(self, example: Example) -> bool:
        """Whether a text of the example spells out a control token, and is not to be read as one."""
        everything = (*example.prompt, *itertools.chain.from_iterable(example.completions))
        return not self.parse_control_tokens and any(
            self._begins in text and self._spelled.search(text) for text in _strings(everything, example.tools)
        )

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _masked(self, example: Example) -> Masked:
        where = place(example.source, example.row)
        self._check_recipe(example, where)
        return self._mask.of(example, where)

    def _count(self, masked: Masked) -> None:
        """Counts what is odd about an example that can be used."""
        where = place(masked.example.source, masked.example.row)
        self.num_chats += not masked.is_text
        if self.spells_control(masked.example):
            self.report.count("control_text", where)
        if masked.empty_answer:
            self.report.count("empty_answers", where)
        if masked.no_instruction:
            self.report.count("no_instruction", where)

    def _check_recipe(self, example: Example, where: str) -> None:
        """Refuses what no row of this kind could satisfy, so that skipping rows does not hide it."""
        if is_text(example):
            if self.train_on != "all":
                raise RecipeError(
                    f"{where}: raw text has no answers, so data.train_on: {self.train_on} leaves nothing to train on; "
                    "set data.train_on: all"
                )
        elif self.overlong == "split":
            raise RecipeError(
                f"{where} is a chat, and data.overlong: split cuts raw text only; choose error, drop or truncate"
            )
        elif self.parse_control_tokens:
            raise RecipeError(
                f"{where} is a chat, and data.parse_control_tokens is for data.format: text only; remove it, or give "
                "the file as text"
            )

    # -- ids ----------------------------------------------------------------------------------------------------------

    def _id(self, name: str) -> int:
        if name not in self._control:
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no {name}; name it in its tokenizer_config.json, "
                "or choose another data.chat_template"
            )
        return self._control[name]

    def _chat_parts(self, plan: Sequence[Target], ids: Callable[[str, Lead], list[int]]) -> list[Weighted]:
        """One part for each piece; of a BOS that is not to be, an empty one."""
        parts: list[Weighted] = []
        empty = True
        for n, (piece, weight) in enumerate(plan):
            if not piece.control:
                parts.append((ids(piece.text, _lead(plan, n)), weight))
            elif piece.text == BOS:
                bos = self._control.get(BOS)
                first = plan[n + 1][0] if n + 1 < len(plan) else None
                # a template that does not insist on BOS, or whose first control token is the BOS
                none = bos is None or (first is not None and first.control and self._id(first.text) == bos)
                parts.append(([] if none or bos is None else [bos], 0.0))
            else:
                # the first token of a document has nothing before it to be predicted from
                parts.append(([self._id(piece.text)], 0.0 if empty else weight))
            empty = empty and not parts[-1][0]
        return parts

    def _text_parts(self, example: Example, body: list[int], weight: float) -> list[Weighted]:
        """BOS, text, EOS; a parsed text keeps a BOS of its own, and any end of turn it ends with."""
        bos, eos = self._id(BOS), self._id(EOS)
        if self.parse_control_tokens:
            body = body[1:] if body[:1] == [bos] else body
            if bos in body:
                raise _Unusable(
                    f"{place(example.source, example.row)}: the text holds {self.tokenizer.bos_token} inside, so it is "
                    "more than one document; give each document a row of its own",
                    kind="bos_doubled",
                )
        ends = {eos}
        if self.parse_control_tokens:
            ends |= {
                self._control[t] for template in TEMPLATES.values() for t in template.terminators if t in self._control
            }
        if not body or body[-1] not in ends:
            body = [*body, eos]
        return [([bos], 0.0), (body, weight)]

    # -- length -------------------------------------------------------------------------------------------------------

    def _fit_document(self, parts: list[Weighted], example: Example) -> list[Tokens]:
        """The parts as samples of at most `max_length` tokens, by the `overlong` policy."""
        length = _length(parts)
        if length <= self.max_length:
            return [_tokens(example, parts)]
        if self.overlong == "split":
            self.report.count("split", place(example.source, example.row))
            return [_tokens(example, piece) for piece in _split(parts, self.max_length)]
        return self._overlong(length, example, lambda: _tokens(example, _cut(parts, self.max_length)))

    def _fit_branches(self, plan: Masked, ids: Callable[[str, Lead], list[int]]) -> list[Tokens]:
        """The prompt once, as an untrained trunk, and each completion as a branch that continues it.

        Each branch together with the trunk has at most `max_length` tokens.
        """
        assert self.template is not None, "a mask of a chat has needed it"
        example, where = plan.example, place(plan.example.source, plan.example.row)
        starts = [_completion_start(branch, example) for branch in plan.branches]
        trunk_pieces = [piece for piece, _ in plan.branches[0][: starts[0]]]
        for branch, start in zip(plan.branches, starts, strict=True):
            if [piece for piece, _ in branch[:start]] != trunk_pieces:
                raise _Unusable(
                    f"{where}: chat_template '{self.template.name}' renders the prompt differently before each "
                    "completion, so that they cannot be compared; choose another data.chat_template"
                )
        parts = [self._chat_parts(branch, ids) for branch in plan.branches]
        trunk = [(run, 0.0) for run, _ in parts[0][: starts[0]]]
        branches = [branch[start:] for branch, start in zip(parts, starts, strict=True)]
        if _alike(branches):  # though their texts differ
            error = same_answers(where)
            raise _Unusable(str(error), error.kind)
        room = self.max_length - _length(trunk)
        longest = max(map(_length, branches))
        if longest <= room:
            return [_tokens(example, trunk, branches)]
        # the prompt stays whole, for all answers the same
        kept = [_cut(branch, max(room, 0)) for branch in branches]
        trained = all(any(weight for ids, weight in branch if ids) for branch in kept)
        lost = "cut_away" if not trained else "cut_equal" if _alike(kept) else ""
        return self._overlong(_length(trunk) + longest, example, lambda: _tokens(example, trunk, kept), lost=lost)

    def _hopeless(self, plan: Masked) -> bool:
        """Whether a row has so much text that it need not be tokenised to be refused, or dropped and counted."""
        if self._longest is None or self.parse_control_tokens or self.overlong not in ("error", "drop"):
            return False
        texts = max(sum(len(p.text) for p, _ in branch if not p.control) for branch in plan.branches)
        least = -(-texts // self._longest)
        if least <= self.max_length:
            return False
        self._overlong(least, plan.example, _never, at_least=True)
        return True

    def _overlong(
        self, length: int, example: Example, cut: Callable[[], Tokens], at_least: bool = False, lost: str = ""
    ) -> list[Tokens]:
        """What becomes of a row that is too long; `lost` says under which count a cut would leave nothing of use."""
        where = place(example.source, example.row)
        if self.overlong == "error":
            choices = "drop, truncate or split" if is_text(example) else "drop or truncate"
            raise DataError(
                f"{where}: {'at least ' if at_least else ''}{length:,} tokens, more than data.max_length: "
                f"{self.max_length}; raise it, or set "
                f"data.overlong to {choices}",
                kind="too_long",
            )
        if self.overlong == "drop":
            self.report.count("dropped", where)
            self.report.lost_tokens += length
            return []
        sample = cut()
        if lost or not sample.num_trained:
            self.report.count(lost or "cut_away", where)
            self.report.lost_tokens += length
            return []
        self.report.count("truncated", where)
        self.report.lost_tokens += length - self.max_length
        return [sample]


class _Unusable(DataError):
    """A row that only its ids show to be unusable."""


def _never() -> Tokens:
    raise AssertionError("a row that is refused or dropped is not cut")


def _lead(plan: Sequence[Target], n: int) -> Lead:
    """How the text at `n` begins, by what stands before it."""
    lead = plan[n][0].lead
    if lead is not None:
        return "always" if lead else "never"
    if not n:
        return "begin"
    return "inner" if plan[n - 1][0].control else "never"


def _texts(plan: Sequence[Target]) -> Iterator[tuple[str, Lead]]:
    return ((piece.text, _lead(plan, n)) for n, (piece, _) in enumerate(plan) if not piece.control)


def _strings(messages: Iterable[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every text of an example that a template may render."""
    for message in messages:
        yield message.content
        yield from (name for name in (message.name, message.call_id) if name)
        for call in message.tool_calls:
            yield call.name
            yield tojson(call.arguments)
    yield from map(tojson, tools)


def _completion_start(plan: Sequence[Target], example: Example) -> int:
    """The piece at which the completion begins: after the header of an answer, which is a prompt's end."""
    first = len(example.prompt)
    answer = (*example.prompt, *example.completions[0])[first].role in ANSWERS
    for n, (piece, _) in enumerate(plan):
        if (piece.owner if answer else piece.message) == first:
            return n
    return len(plan)


def _alike(branches: Iterable[Iterable[Weighted]]) -> bool:
    """Whether two of the branches have the same ids."""
    runs = [[i for ids, _ in branch for i in ids] for branch in branches]
    return any(run in runs[:n] for n, run in enumerate(runs))


def _length(parts: Iterable[Weighted]) -> int:
    return sum(len(ids) for ids, _ in parts)


def _tokens(example: Example, trunk: Iterable[Weighted], branches: Iterable[Iterable[Weighted]] = ()) -> Tokens:
    runs = tuple(map(_spans, branches))
    return Tokens(_spans(trunk), runs, example.source, example.row, _scores(example) if runs else ())


def _scores(example: Example) -> tuple[float, ...]:
    """How good the data calls each completion; nothing where it does not say."""
    if example.label is not None:
        return (float(example.label),)
    if example.margin is not None:
        return (example.margin, 0.0)
    return example.scores or ()


def _spans(parts: Iterable[Weighted]) -> tuple[Span, ...]:
    """Neighbouring parts of one weight become one span; the spans are views of one array."""
    ids: list[int] = []
    ends: list[tuple[int, float]] = []  # where a span ends, and its weight
    for run, weight in parts:
        if run:
            ids += run
            if ends and ends[-1][1] == weight:
                ends.pop()
            ends.append((len(ids), weight))
    flat, start, spans = np.asarray(ids, dtype=np.int32), 0, []
    for stop, weight in ends:
        spans.append(Span(flat[start:stop], weight > 0, weight or 1.0))
        start = stop
    return tuple(spans)


def _cut(parts: Sequence[Weighted], length: int) -> list[Weighted]:
    """The first `length` tokens; nothing is put in the place of what was cut."""
    out: list[Weighted] = []
    for ids, weight in parts:
        out.append((ids[:length], weight))
        length -= len(out[-1][0])
    return out


def _split(parts: Sequence[Weighted], length: int) -> list[list[Weighted]]:
    """Raw text in pieces of at most `length` tokens that each begin with BOS; every token of the body is in one."""
    (bos, _), (body, weight) = parts
    room = length - len(bos)
    if room < 1:
        raise RecipeError(f"data.max_length: {length} leaves no room beside BOS; raise it to at least 2")
    return [[(bos, 0.0), (body[i : i + room], weight)] for i in range(0, len(body), room)]
