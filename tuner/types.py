"""The data that flows: Example -> Tokens -> Batch -> log-probs.

A row on disk becomes an `Example` (messages), a template renders it to `Tokens` (spans of ids, trained or not), packing
lays many `Tokens` into one flat `Batch`, and the policy turns a `Batch` into one log-probability per prediction.
Sizes in comments: N tokens in a row, M predictions, S scored sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Roles whose content is an answer, which masking policies may train.
ANSWERS = frozenset({"assistant", "middle"})


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls. `arguments` keeps the keys, the order and the nulls of the file."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `role` is `system`, `user`, `assistant` or `tool` (the result of a call); `input` (what an Alpaca instruction is
    about); `prefix`, `suffix` and `middle` of infilled code; or `text` for raw text that no template wraps.
    `train` overrides the masking policy for this message (`None`: the policy decides).
    `weight` multiplies the loss of its tokens; 0 is the same as `train=False`.
    `tool_calls` are made by an assistant turn; `name` and `call_id` say which function and call a `tool` turn answers.
    """

    role: str
    content: str
    train: bool | None = None
    weight: float = 1.0
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class Example:
    """Messages shared by all completions, then one or more completions (each a list of messages).

    A chat has one completion, which begins at its first trainable turn. A preference pair has two: chosen, rejected; a
    ranked list n, the best one first. Unpaired data has one completion and a `label`.

    Args:
        tools: JSON schemas of the functions that the assistant may call, as the file has them.
        label: whether the one completion is a good one (unpaired data).
        margin: how much better the chosen one is than the rejected one, if the data says so.
        scores: of each completion, higher is better, if the data says so.
        order: where in the row each completion stood, if they were put in order.
        source, row: where it came from: a file or Hub id, and the 0-based row in it.
    """

    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]
    source: str = ""
    row: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    label: bool | None = None
    margin: float | None = None
    scores: tuple[float, ...] | None = None
    order: tuple[int, ...] = ()

    @property
    def is_preference(self) -> bool:
        """Whether its completions are to be compared, or judged by a label, instead of imitated."""
        return len(self.completions) > 1 or self.label is not None


@dataclass(frozen=True, eq=False)
class Span:
    """A run of token ids that are all trained (prediction targets) or all not."""

    ids: np.ndarray  # [n] int32
    trained: bool
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Tokens:
    """A rendered example: a trunk, and alternative branches that each continue the trunk.

    In SFT there are no branches and the trained spans lie in the trunk. A preference trunk is never trained. `scores`
    says of each branch how good the data calls it, higher is better, if it does: of a pair with a margin, margin and 0;
    of one labelled answer, 1 or 0.
    """

    trunk: tuple[Span, ...]
    branches: tuple[tuple[Span, ...], ...] = ()
    source: str = ""
    row: int = 0
    scores: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Tokens the model runs over: the trunk once, and every branch."""
        return sum(len(s.ids) for spans in (self.trunk, *self.branches) for s in spans)

    @property
    def labels(self) -> tuple[bool, ...]:
        """Which branches are good answers: a single one by its label, else the first."""
        if len(self.branches) == 1:
            return (self.scores[0] > 0,)
        return tuple(branch == 0 for branch in range(len(self.branches)))

    @property
    def num_trained(self) -> int:
        """Tokens that are prediction targets with a non-zero weight."""
        return sum(len(s.ids) for spans in (self.trunk, *self.branches) for s in spans if s.trained and s.weight)

    def ids(self) -> list[int]:
        """Trunk and branches in row order, as one flat list."""
        return [int(i) for spans in (self.trunk, *self.branches) for s in spans for i in s.ids]


@dataclass(frozen=True)
class Segment:
    """Queries `[start, stop)` of the row and the key ranges they may see, in row positions.

    Every range but the last is seen whole. The last is the queries' own range, seen causally; it is bottom-right
    aligned with the queries, and so the rule "same document, not later, trunk or own branch" holds for all.
    """

    query: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """One flat row of N tokens and M predictions: predict `targets[m]` from the state at `predict_at[m]`."""

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64; restarts at each document; each branch continues its trunk
    doc_ids: Tensor  # [N] int64; attention never crosses documents
    branch_ids: Tensor  # [N] int64; 0 = trunk, seen by all of the document; b > 0 = seen by itself only
    predict_at: Tensor  # [M] int64; where in the row the predicting state is
    targets: Tensor  # [M] int64
    weights: Tensor  # [M] float32, > 0
    seq_ids: Tensor  # [M] int64; which scored sequence the prediction belongs to
    seq_doc: Tensor  # [S] int64; document of each scored sequence
    seq_branch: Tensor  # [S] int64; branch of each scored sequence
    seq_end: Tensor  # [S] int64; where in the row its last token is: the terminator, trained or not
    plan: tuple[Segment, ...]  # the attention plan, on the host
    rows: tuple[tuple[str, int], ...] = ()  # [documents] (source, row) for messages to people
    sequences: tuple[tuple[int, int], ...] = ()  # [S] seq_doc and seq_branch once more, on the host
    weight_sum: float = 0.0  # sum of weights, worked out on the host

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_predictions(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose tensors live on `device`, brought there by one transfer; the plan stays on the host.

        Nothing waits for the transfer: what is queued on the device after it comes after it.
        """
        device = torch.device(device)
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if device.type == "cpu" or any(tensor.device.type != "cpu" for tensor in tensors.values()):
            moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        else:
            blob = joined(list(tensors.values()), pinned=device.type == "cuda").to(device, non_blocking=True)
            moved = dict(zip(tensors, parted(blob, list(tensors.values())), strict=True))
        return replace(self, **moved)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums per-prediction values `[M]` into per-sequence values `[S]`."""
        return values.new_zeros(self.seq_doc.shape[0]).index_add(0, self.seq_ids, values)


@dataclass(frozen=True, eq=False)
class Scored:
    """Answers as losses see them: log-probs summed over the scored tokens of each answer. All `[S]`.

    Args:
        policy: Σ_t log π(y_t | x, y_<t), with gradient while training.
        tokens: how many tokens were summed.
        reference: the same sum under the reference model.
        shared, shared_reference: the two sums over the first n tokens only, n being the count of the shorter answer of
            the pair (LD-DPO).
        collision: Σ_t log Σ_v π(v | x, y_<t)², over the vocabulary v, without gradient (WPO with `sampled` weights).
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None
    shared: Tensor | None = None
    shared_reference: Tensor | None = None
    collision: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """log π(y|x) / π_ref(y|x), `[S]`."""
        assert self.reference is not None, "this loss needs the reference's log-probs"
        return self.policy - self.reference

    def take(self, rows: Tensor | slice) -> Scored:
        """The answers at `rows`."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        taken: dict[str, Any] = {name: tensor[rows] for name, tensor in tensors.items()}
        return replace(self, **taken)

    @staticmethod
    def cat(parts: Sequence[Scored]) -> Scored:
        """All answers of `parts`, in their order; a sum that one part has, all must have."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Scored)}
        joined = {name: torch.cat(c) for name, c in columns.items() if any(value is not None for value in c)}
        return Scored(**joined)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What a loss over P preference pairs receives: answer p of `chosen` was preferred to answer p of `rejected`."""

    chosen: Scored  # [P]
    rejected: Scored  # [P]
    margins: Tensor | None = None  # [P]; by how much, if the data says so

    def take(self, rows: Tensor | slice) -> Pairs:
        """The pairs at `rows`."""
        margins = None if self.margins is None else self.margins[rows]
        return Pairs(self.chosen.take(rows), self.rejected.take(rows), margins)

    @staticmethod
    def cat(parts: Sequence[Pairs]) -> Pairs:
        """All pairs of `parts`, in their order; margins that one part has, all must have."""
        margins: list[Any] = [part.margins for part in parts]
        return Pairs(
            Scored.cat([part.chosen for part in parts]),
            Scored.cat([part.rejected for part in parts]),
            torch.cat(margins) if any(m is not None for m in margins) else None,
        )


@dataclass(frozen=True, eq=False)
class Unpaired:
    """What a loss over R single answers receives. `mismatched` is of the whole optimizer step, without gradient."""

    answers: Scored  # [R]
    desirable: Tensor  # [R] bool; whether the label calls the answer good
    mismatched: Scored | None = None  # [K]; answers of the step, each scored after the prompt of another row

    def take(self, rows: Tensor | slice) -> Unpaired:
        """The answers at `rows`, with the mismatched ones of the whole step."""
        return Unpaired(self.answers.take(rows), self.desirable[rows], self.mismatched)

    @staticmethod
    def cat(parts: Sequence[Unpaired]) -> Unpaired:
        """All answers of `parts`, in their order; mismatched answers that one part has, all must have."""
        mismatched: list[Any] = [part.mismatched for part in parts]
        return Unpaired(
            Scored.cat([part.answers for part in parts]),
            torch.cat([part.desirable for part in parts]),
            Scored.cat(mismatched) if any(m is not None for m in mismatched) else None,
        )


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a loss of a reward model receives: the rewards of L lists of up to K answers, the best one first."""

    rewards: Tensor  # [L, K] float32
    lengths: Tensor  # [L] int64; answers in each list, 2 or more; what lies behind them is not read
    margins: Tensor | None = None  # [L]; of the first over the second, in lists of two


# --- from the host to the device ---

ALIGNMENT = 16  # bytes; kernels read whole vectors of so many


def joined(tensors: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
    """The bytes of contiguous `tensors` one after another, each from a multiple of ALIGNMENT on: `[bytes]` uint8."""
    starts, size = _places(tensors)
    blob = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    room = blob.numpy()  # which copies without waking torch's threads
    for tensor, start in zip(tensors, starts, strict=True):
        room[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    return blob


def parted(blob: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `joined` laid into `blob`, as views of it; `like` are tensors of their shapes and dtypes."""
    return [
        blob[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(like, _places(like)[0], strict=True)
    ]


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each of `tensors` begins in a blob of all, and the size of that; in bytes."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, size


def on_device(values: Sequence[Any] | np.ndarray, dtype: type[np.generic], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on `device`; `torch.tensor(values, device=...)` would wait for the copy."""
    tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def span(ids: Sequence[int] | np.ndarray, trained: bool, weight: float = 1.0) -> Span:
    """A `Span` from any sequence of ids."""
    return Span(np.asarray(ids, dtype=np.int32), trained, weight)
