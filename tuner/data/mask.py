"""Example -> the pieces of its chat, each with its weight as a target: which parts are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tuner.data import ghost
from tuner.data.templates import TEMPLATES, Piece, Template, control_ids, lacking
from tuner.errors import DataError, ModelError
from tuner.types import ANSWERS, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "last", "all"]
Target = tuple[Piece, float]  # a piece, and its weight as a target (0: not trained)


@dataclass(frozen=True)
class Masked:
    """An example as its template sees it; of a preference, prompt and completion anew for each completion."""

    example: Example
    branches: tuple[tuple[Target, ...], ...]
    empty_answer: bool = False  # whether an answer that is trained says nothing
    no_instruction: bool = False  # whether ghost attention finds nothing to do

    @property
    def is_text(self) -> bool:
        return is_text(self.example)


class Mask:
    """One template with one masking policy.

    Args:
        tokenizer: decides which of the template's optional control tokens there are.
        template: of chats; None if there is only raw text.
        train_on: `assistant` (every answer and its terminator), `last` (the last one), `all` (everything but BOS).
        ghost_attention: whether a system instruction is to reach through all turns (see `tuner.data.ghost`).
        train_control_tokens: whether control tokens of compared answers are trained, as their text is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template | None,
        train_on: TrainOn,
        ghost_attention: bool,
        train_control_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.train_on, self.ghost_attention = train_on, ghost_attention
        self.train_control_tokens = train_control_tokens
        have = control_ids(tokenizer)
        # an optional one that the tokenizer lacks is refused when a conversation needs it; a tag is then plain text
        self._lacks = tuple(n for n in (template.optional if template else ()) if n not in have)
        self._as_text = frozenset(template.tags if template else ()) - have.keys()

    def of(self, example: Example, where: str) -> Masked:
        """The pieces of an example with the weight of each as a target; `where` names the row.

        Raises:
            DataError: nothing to train on, or a role or a part that the template has no place for.
        """
        if is_text(example):
            ((message,),) = example.completions
            (weight,) = self._message_weights(example, (message,), where)
            return Masked(example, (((Piece(message.content, owner=0, message=0), weight),),))
        haunted = ghost.trained(example) if self.ghost_attention else example
        no_instruction, example = self.ghost_attention and haunted is example, haunted
        example = self._adapted_example(example, where)
        empty, branches = False, []
        for completion in example.completions:
            messages = (*example.prompt, *completion)
            self._check_roles(messages, where, example.tools)
            weights = self._message_weights(example, messages, where)
            answers = (m for m, weight in zip(messages, weights, strict=True) if m.role in ANSWERS and weight)
            empty |= any(not m.content.strip() and not m.tool_calls for m in answers)
            if empty and example.is_preference:
                raise DataError(
                    f"{where}: an answer is empty, so that there is nothing to compare or to judge; remove the row, or "
                    "fill it in",
                    kind="empty_side",
                )
            targets = list(self._targets(self._pieces(messages, where, example.tools), weights))
            if example.is_preference and not self.train_control_tokens:
                targets = [(piece, 0.0 if self._is_control(piece) else weight) for piece, weight in targets]
            if not any(weight and piece.text for piece, weight in targets):  # as where an answer is only quoted
                raise self._nothing(where)
            branches.append(tuple(self._joined(targets, len(example.prompt) if example.is_preference else None)))
        if any(branch in branches[:n] for n, branch in enumerate(branches)):
            raise same_answers(where)
        return Masked(example, tuple(branches), empty, no_instruction)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Target]:
        """The pieces to generate an answer from, up to its header; none is a target."""
        where = "the prompt"
        messages = self._adapted(messages, where)
        self._check_roles(messages, where, tools)
        return self._joined((piece, 0.0) for piece in self._pieces(messages, where, tools, add_generation_prompt=True))

    def _targets(self, pieces: Iterable[Piece], weights: Sequence[float]) -> Iterator[Target]:
        for piece in pieces:
            owner = piece.message if self.train_on == "all" else piece.owner
            yield piece, 0.0 if owner is None else weights[owner]

    def _is_control(self, piece: Piece) -> bool:
        return piece.control and piece.text not in self._as_text

    def _joined(self, targets: Iterable[Target], completion: int | None = None) -> list[Target]:
        """Neighbouring texts of one owner and weight as one, which is tokenised whole.

        A text of message `completion` or later is not joined to one before it, so that it can begin a branch.
        """
        out: list[Target] = []
        for piece, weight in targets:
            if piece.control and not self._is_control(piece):
                piece = piece._replace(control=False)
            if out and not piece.control and piece.lead is None:
                last, other = out[-1]
                begins = completion is not None and _before(last, completion) and not _before(piece, completion)
                if not last.control and last.owner == piece.owner and other == weight and not begins:
                    out[-1] = last._replace(text=last.text + piece.text), weight
                    continue
            out.append((piece, weight))
        return out

    def _pieces(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
    ) -> list[Piece]:
        template = self._chat_template()
        try:
            pieces = template.pieces(messages, add_generation_prompt, tools=tools)
        except DataError as error:
            raise DataError(f"{where}: {error}", error.kind) from None
        if self._lacks and (needed := [p.text for p in pieces if p.control and p.text in self._lacks]):
            raise lacking(template, needed, self.tokenizer)
        return pieces

    def _adapted_example(self, example: Example, where: str) -> Example:
        prompt = self._adapted(example.prompt, where)
        completions = tuple(self._adapted(completion, where) for completion in example.completions)
        if prompt is example.prompt and completions == example.completions:
            return example
        return replace(example, prompt=prompt, completions=completions)

    def _adapted(self, messages: Sequence[Message], where: str) -> tuple[Message, ...]:
        """The messages with roles that this template has: an `input` goes into the user turn before it."""
        if all(message.role != "input" for message in messages) or "input" in self._chat_template().roles:
            return tuple(messages)  # of a tuple, itself
        out: list[Message] = []
        for i, message in enumerate(messages):
            if message.role != "input":
                out.append(message)
                continue
            if not out or out[-1].role != "user":
                raise DataError(
                    f"{where}: message {i} has the role 'input', and no user turn comes before it; add the instruction"
                )
            out[-1] = replace(out[-1], content=f"{out[-1].content}\n\n{message.content}")
        return tuple(out)

    def _message_weights(self, example: Example, messages: Sequence[Message], where: str) -> list[float]:
        """The weight of each message as a target: 0 where it is not trained."""
        prompt = len(example.prompt)
        turns = [i for i, m in enumerate(messages) if m.role in ANSWERS and i >= prompt]
        policy = {"all": range(len(messages)), "assistant": turns, "last": turns[-1:]}[self.train_on]
        weights = []
        for i, message in enumerate(messages):
            if message.train and message.role not in ANSWERS and self.train_on != "all":
                raise DataError(
                    f"{where}: message {i} asks for train: true, but only assistant turns are trained under "
                    f"data.train_on: {self.train_on}; remove it, or set data.train_on: all"
                )
            if message.train and i < prompt and example.is_preference:
                raise DataError(
                    f"{where}: message {i} asks for train: true in the prompt, and only the answers that are compared "
                    "are trained; remove it"
                )
            trained = message.train if message.train is not None else i in policy
            weights.append(message.weight if trained else 0.0)
        if not any(weights):
            raise self._nothing(where)
        return weights

    def _nothing(self, where: str) -> DataError:
        return DataError(
            f"{where}: nothing to train on: every turn that data.train_on: {self.train_on} would train has "
            "train: false or weight: 0, or there is none; remove the row, or change data.train_on",
            kind="nothing_to_train",
        )

    def _check_roles(self, messages: Sequence[Message], where: str, tools: Sequence[Mapping[str, Any]]) -> None:
        template = self._chat_template()
        if not template.tools and (tools or any(m.tool_calls for m in messages)):
            able = ", ".join(t.name for t in TEMPLATES.values() if t.tools)
            raise DataError(
                f"{where}: there are tools or tool calls, which chat_template '{template.name}' has no place for; "
                f"templates that have: {able}"
            )
        for i, message in enumerate(messages):
            if message.role not in template.roles:
                allowed = ", ".join(template.roles)
                raise DataError(
                    f"{where}: message {i} has the role {message.role!r}, which chat_template '{template.name}' does "
                    f"not know; allowed: {allowed}",
                    kind="unknown_role",
                )

    def _chat_template(self) -> Template:
        if self.template is None:
            raise ModelError(f"a chat needs a chat template; set data.chat_template to one of {', '.join(TEMPLATES)}")
        return self.template


def is_text(example: Example) -> bool:
    """Whether an example is raw text, which no template wraps."""
    return not example.prompt and len(example.completions[0]) == 1 and example.completions[0][0].role == "text"


def same_answers(where: str) -> DataError:
    """The error of a row with two answers that nothing tells apart."""
    return DataError(
        f"{where}: two of the answers are the same to the token, so that neither is the better one; remove the row",
        kind="same_completions",
    )


def _before(piece: Piece, message: int) -> bool:
    return piece.message is None or piece.message < message
