"""Tokens -> cells: each token's own text as it can be shown, trained or not, with nothing invisible left in it.

A cell is one token, or the few that hold one character between them: a byte-level token may end inside of a character
of UTF-8.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, models

from tuner.data.templates import control_ids
from tuner.types import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Invisible, though Unicode does not count them among the control and format characters: fillers, selectors, blanks.
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
_MARKS = {"\n": "↵\n", "\t": "⇥"}


@dataclass(frozen=True)
class Cell:
    """One token, or those that hold one character between them.

    `text` is exactly theirs; a byte that belongs to no whole character is half of a surrogate pair in it, as in
    Python's `surrogateescape`. `at` is the position of the first in the document, counted from 0; a branch continues
    its trunk. `cut` says that `data.max_length` takes it away.
    """

    ids: tuple[int, ...]
    text: str
    at: int
    control: bool = False
    trained: bool = False
    weight: float = 1.0
    cut: bool = False


class CellReader:
    """Reads the text of single tokens from a tokenizer's vocabulary.

    Decoding one id after the other would not do: it turns parts of characters into U+FFFD, and some decoders take a
    blank from the beginning of whatever they are given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._control = frozenset(control_ids(tokenizer).values())
        self._added = {int(i): str(t.content) for i, t in tokenizer.added_tokens_decoder.items()}
        shell = Tokenizer(models.BPE())  # to read the decoder without writing out the whole vocabulary
        if tokenizer.backend_tokenizer.decoder is not None:
            shell.decoder = tokenizer.backend_tokenizer.decoder
        spec = json.dumps(json.loads(shell.to_str())["decoder"])
        self._byte_level = '"ByteLevel"' in spec
        self._blanks = any(word in spec for word in ("▁", '"Metaspace"', '"ByteFallback"'))

    def cells(self, spans: Sequence[Span], start: int = 0, cut: bool = False) -> list[Cell]:
        """The cells of spans that begin at position `start` of their document."""
        out: list[Cell] = []
        for span in spans:
            trained = span.trained and span.weight != 0 and not cut
            for ids, text, control in self._groups(span.ids.tolist()):
                out.append(Cell(ids, text, start, control, trained, span.weight if trained else 1.0, cut))
                start += len(ids)
        return out

    def name(self, token: int) -> str:
        """How a control token is spelt."""
        return self._added.get(token, str(token))

    def _groups(self, ids: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str, bool]]:
        """Ids, their text, and whether they are a control token."""
        pending: list[int] = []
        held = b""  # the bytes of `pending`, which end inside of a character
        for token in ids:
            if token in self._control:
                if pending:
                    yield tuple(pending), _escaped(held), False
                    pending, held = [], b""
                yield (token,), self.name(token), True
                continue
            new = self._bytes(token)
            if pending and _state(held + new) == "broken":  # the character is never finished
                yield tuple(pending), _escaped(held), False
                pending, held = [], b""
            pending, held = [*pending, token], held + new
            if _state(held) != "unfinished":
                yield tuple(pending), _escaped(held), False
                pending, held = [], b""
        if pending:
            yield tuple(pending), _escaped(held), False

    def _bytes(self, token: int) -> bytes:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._byte_level:
            return b"".join(_BYTE.get(c) or c.encode() for c in piece)
        if self._blanks:
            byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


def turns(cells: Sequence[Cell], ends: Container[int]) -> list[list[Cell]]:
    """Cells in groups that each end with a control token of `ends`, as the lines of a conversation do."""
    out: list[list[Cell]] = [[]]
    for cell in cells:
        if out[-1] and out[-1][-1].control and out[-1][-1].ids[0] in ends:
            out.append([])
        out[-1].append(cell)
    return [group for group in out if group]


def visible(text: str, reserved: str = "") -> list[tuple[str, bool]]:
    """`text` in runs, each with whether it is a mark of ours in the place of what one cannot see.

    A newline is `↵` and a newline, a tab is `⇥`; a control, format, unassigned or zero-width character, a blank that is
    no plain one and any character of `reserved` is its code, as `⟨U+200B⟩`, and a byte of no whole character `⟨E2⟩`.
    So nothing in it can steer a terminal.
    """
    runs = itertools.groupby((_shown(character, reserved) for character in text), key=lambda shown: shown[1])
    return [("".join(shown for shown, _ in run), mark) for mark, run in runs]


def _shown(character: str, reserved: str) -> tuple[str, bool]:
    if character in _MARKS:
        return _MARKS[character], True
    if character not in reserved and not _is_unseen(character):
        return character, False
    code = ord(character)
    return f"⟨{code - 0xDC00:02X}⟩" if 0xDC80 <= code <= 0xDCFF else f"⟨U+{code:04X}⟩", True


def clean(text: str) -> str:
    """`text` on one line, with marks in the place of what one cannot see."""
    return "".join(shown.replace("\n", "") for shown, _ in visible(text))


def _is_unseen(character: str) -> bool:
    if " " <= character <= "~":
        return False
    if character in _UNSEEN or any(ord(character) in span for span in _SELECTORS):
        return True
    return unicodedata.category(character) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


def _escaped(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _state(data: bytes) -> Literal["whole", "unfinished", "broken"]:
    """Whether bytes are whole characters, all but the last one, which more bytes may finish, or no UTF-8 at all."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return "unfinished" if error.reason == "unexpected end of data" else "broken"
    return "whole"


def _byte_alphabet() -> dict[str, bytes]:
    """The character that stands for each byte in a byte-level vocabulary (published with GPT-2): a printable byte for
    itself, the n-th other one for character 256 + n."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(b): bytes([b]) for b in itself} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE = _byte_alphabet()
