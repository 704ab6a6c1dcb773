"""Example -> Tokens: a template's pieces become ids, and each id is trained or not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from tuner.data.encode import TextEncoder
from tuner.data.report import DataReport, place
from tuner.data.templates import BOS, EOS, TEMPLATES, Piece, Template, control_ids
from tuner.errors import DataError, ModelError, RecipeError
from tuner.types import Example, Message, Span, Tokens, span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "last", "all"]
Overlong = Literal["error", "drop", "truncate", "split"]
OnBad = Callable[[Example, DataError], None]
Weighted = tuple[list[int], float]  # ids, and their weight as targets (0: not trained)


class Renderer:
    """Renders examples with one template and one masking policy.

    Args:
        tokenizer: a fast tokenizer with a BOS.
        template: of chats; None if there is only raw text.
        train_on: `assistant` (every answer and its terminator), `last` (the last one), `all` (everything but BOS).
        max_length: of a document, in tokens.
        overlong: what happens to a longer one.
        parse_control_tokens: whether raw text may hold control tokens, as pre-templated files do.

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
    ) -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self.max_length, self.overlong, self.parse_control_tokens = max_length, overlong, parse_control_tokens
        self.report = DataReport()
        self.num_chats = 0
        self._encoder = TextEncoder(tokenizer)
        self._control = control_ids(tokenizer)
        terminators = template.terminators if template else ()
        for name in template.control if template else (BOS, EOS):
            self._id(name)
        self.terminator_ids = tuple(dict.fromkeys(self._control[name] for name in terminators))
        ends = [*self.terminator_ids, *([self._control[EOS]] if EOS in self._control else [])]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        spelled = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._spelled = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))) or r"(?!)")

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
        plans: list[list[tuple[Piece, float]] | None] = []
        for example in examples:
            try:
                plans.append(self._plan(example))
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(example, error)
                plans.append(None)
        texts = [e.completions[0][0].content for e, p in zip(examples, plans, strict=True) if p and _is_text(e)]
        documents = iter(self._encoder.parsed(texts) if self.parse_control_tokens else self._encoder.document(texts))
        inner = self._encoder.inner(
            piece.text
            for example, plan in zip(examples, plans, strict=True)
            if plan and not _is_text(example)
            for piece, _ in plan
            if not piece.control
        )
        out: list[list[Tokens]] = []
        for example, plan in zip(examples, plans, strict=True):
            if plan is None:
                out.append([])
            elif _is_text(example):
                try:
                    out.append(self._fit(self._text_parts(example, next(documents), plan[0][1]), example))
                except _Unusable as error:
                    if on_bad is None:
                        raise
                    on_bad(example, error)
                    out.append([])
            else:
                out.append(self._fit(self._chat_parts(plan, inner), example))
        return out

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids to generate an answer from: BOS, the messages, the header of an answer. For a `text` message: BOS and
        the text."""
        if len(messages) == 1 and messages[0].role == "text":
            return [self._id(BOS), *self._encoder.document([messages[0].content])[0]]
        template = self._chat_template()
        self._check_roles(messages, "the prompt")
        plan = [(piece, 0.0) for piece in template.pieces(messages, add_generation_prompt=True)]
        texts = self._encoder.inner(piece.text for piece, _ in plan if not piece.control)
        return [i for ids, _ in self._chat_parts(plan, texts) for i in ids]

    # -- masking ------------------------------------------------------------------------------------------------------

    def _plan(self, example: Example) -> list[tuple[Piece, float]]:
        """The pieces of an example with the weight of each as a target. Counts what is odd about it."""
        where = place(example.source, example.row)
        assert len(example.completions) == 1, "several completions are rendered by the preference stages"
        messages = (*example.prompt, *example.completions[0])
        self._check_recipe(example, where)
        if not _is_text(example):
            self._check_roles(messages, where)
        weights = self._message_weights(messages, len(example.prompt), where)
        if not self.parse_control_tokens and any(self._spelled.search(m.content) for m in messages):
            self.report.count("control_text", where)
        if _is_text(example):
            return [(Piece(messages[0].content, owner=0, message=0), weights[0])]
        self.num_chats += 1
        answers = (m for m, weight in zip(messages, weights, strict=True) if m.role == "assistant" and weight)
        if any(not m.content.strip() for m in answers):
            self.report.count("empty_answers", where)
        plan = []
        for piece in self._chat_template().pieces(messages):
            owner = piece.message if self.train_on == "all" else piece.owner
            plan.append((piece, 0.0 if owner is None else weights[owner]))
        return plan

    def _message_weights(self, messages: Sequence[Message], prompt: int, where: str) -> list[float]:
        """The weight of each message as a target: 0 where it is not trained."""
        turns = [i for i, m in enumerate(messages) if m.role == "assistant" and i >= prompt]
        policy = {"all": range(len(messages)), "assistant": turns, "last": turns[-1:]}[self.train_on]
        weights = []
        for i, message in enumerate(messages):
            if message.train and message.role != "assistant" and self.train_on != "all":
                raise DataError(
                    f"{where}: message {i} asks for train: true, but only assistant turns are trained under "
                    f"data.train_on: {self.train_on}; remove it, or set data.train_on: all"
                )
            trained = message.train if message.train is not None else i in policy
            weights.append(message.weight if trained else 0.0)
        if not any(weights):
            raise DataError(
                f"{where}: nothing to train on: every turn that data.train_on: {self.train_on} would train has "
                "train: false or weight: 0, or there is none; remove the row, or change data.train_on"
            )
        return weights

    def _check_recipe(self, example: Example, where: str) -> None:
        """Refuses what no row of this kind could satisfy, so that skipping rows does not hide it."""
        if _is_text(example):
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

    def _check_roles(self, messages: Sequence[Message], where: str) -> None:
        template = self._chat_template()
        for i, message in enumerate(messages):
            if message.role not in template.roles:
                allowed = ", ".join(template.roles)
                raise DataError(
                    f"{where}: message {i} has the role {message.role!r}, which chat_template '{template.name}' does "
                    f"not know; allowed: {allowed}"
                )

    def _chat_template(self) -> Template:
        if self.template is None:
            raise ModelError(f"a chat needs a chat template; set data.chat_template to one of {', '.join(TEMPLATES)}")
        return self.template

    # -- ids ----------------------------------------------------------------------------------------------------------

    def _id(self, name: str) -> int:
        if name not in self._control:
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no {name}; name it in its tokenizer_config.json, "
                "or choose another data.chat_template"
            )
        return self._control[name]

    def _chat_parts(self, plan: Sequence[tuple[Piece, float]], texts: dict[str, list[int]]) -> list[Weighted]:
        parts: list[Weighted] = []
        for n, (piece, weight) in enumerate(plan):
            if not piece.control:
                parts.append((texts[piece.text], weight))
                continue
            if piece.text == BOS:
                bos = self._control.get(BOS)
                first = plan[n + 1][0] if n + 1 < len(plan) else None
                if bos is None or (first is not None and first.control and self._id(first.text) == bos):
                    continue  # a template that does not insist on BOS, or whose first control token is the BOS
                parts.append(([bos], 0.0))
            else:
                # the first token of a document has nothing before it to be predicted from
                parts.append(([self._id(piece.text)], weight if parts else 0.0))
        return parts

    def _text_parts(self, example: Example, body: list[int], weight: float) -> list[Weighted]:
        """BOS, text, EOS; a parsed text keeps a BOS of its own, and any end of turn it ends with."""
        bos, eos = self._id(BOS), self._id(EOS)
        if self.parse_control_tokens:
            body = body[1:] if body[:1] == [bos] else body
            if bos in body:
                raise _Unusable(
                    f"{place(example.source, example.row)}: the text holds {self.tokenizer.bos_token} inside, so it is "
                    "more than one document; give each document a row of its own"
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

    def _fit(self, parts: list[Weighted], example: Example) -> list[Tokens]:
        """The parts as samples of at most `max_length` tokens, by the `overlong` policy."""
        length = sum(len(ids) for ids, _ in parts)
        if length <= self.max_length:
            return [_tokens(parts, example)]
        where = place(example.source, example.row)
        if self.overlong == "error":
            choices = "drop, truncate or split" if _is_text(example) else "drop or truncate"
            raise DataError(
                f"{where}: {length:,} tokens, more than data.max_length: {self.max_length}; raise it, or set "
                f"data.overlong to {choices}"
            )
        if self.overlong == "drop":
            self.report.count("dropped", where)
            self.report.lost_tokens += length
            return []
        if self.overlong == "split":
            self.report.count("split", where)
            return [_tokens(piece, example) for piece in _split(parts, self.max_length)]
        sample = _tokens(_cut(parts, self.max_length), example)
        if not sample.num_trained:
            self.report.count("cut_away", where)
            self.report.lost_tokens += length
            return []
        self.report.count("truncated", where)
        self.report.lost_tokens += length - self.max_length
        return [sample]


class _Unusable(DataError):
    """A row that only its ids show to be unusable."""


def _is_text(example: Example) -> bool:
    return not example.prompt and len(example.completions[0]) == 1 and example.completions[0][0].role == "text"


def _tokens(parts: Iterable[Weighted], example: Example) -> Tokens:
    """Neighbouring parts of one weight become one span."""
    spans: list[Span] = []
    filled = (part for part in parts if part[0])
    for weight, group in itertools.groupby(filled, key=lambda part: part[1]):
        ids = list(itertools.chain.from_iterable(ids for ids, _ in group))
        spans.append(span(ids, trained=weight > 0, weight=weight or 1.0))
    return Tokens(trunk=tuple(spans), source=example.source, row=example.row)


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
