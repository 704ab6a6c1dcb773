"""Strings that spell control tokens -> placeholders -> the same strings, so that no rendering can mistake them.

Before a foreign template renders a chat, whatever in its strings spells an added token of the tokenizer, or could be a
part of one once other text stands beside it, gives way to private-use characters that occur nowhere. The control tokens
of the rendering are then the template's own, and each text is put back where its placeholder came out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")
_POOL = range(0xF0000, 0xFFFFE)
STRUCTURE = ("type", "function")  # of a tool call: OpenAI's word, which templates ask for
_REST = "\x00"  # stands for text between control tokens; no id of it is ever used


class Control(NamedTuple):
    """An added token in a text; `[start, stop)` with the blanks beside it that the tokenizer takes away with it."""

    token: str
    start: int
    inner: int  # where the token itself begins
    end: int  # where it ends
    stop: int


class Splitter:
    """Finds the added tokens of a text exactly as the tokenizer does, blanks, word boundaries and normaliser included.

    Added tokens that are nothing but blanks are text: nobody can forge a turn with them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = [t for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content.strip()]
        self._found = Tokenizer(models.WordLevel({_REST: 0}, unk_token=_REST))
        self._normalizes = tokenizer.backend_tokenizer.normalizer is not None
        if self._normalizes:
            self._found.normalizer = tokenizer.backend_tokenizer.normalizer
        self._found.add_tokens([_as_is(token) for token in added])
        self.tokens = [str(t.content) for t in added]
        self._spelled = re.compile("|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))) or r"(?!)")
        # what a text may begin or end with to become one beside other text
        self._tails = {t[i:] for t in self.tokens for i in range(1, len(t))}
        self._heads = {t[:i] for t in self.tokens for i in range(1, len(t))}
        self._longest = max(map(len, self.tokens), default=0)
        self._first = re.compile("|".join(re.escape(c) for c in sorted({t[0] for t in self.tokens})) or r"(?!)")

    def split(self, text: str) -> list[Control]:
        """The control tokens of a text, in order."""
        found = self._found.encode(text, add_special_tokens=False)
        out = []
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if index:
                part = text[start:stop]
                inner, end = start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())
                out.append(Control(str(self._found.id_to_token(index)), start, inner, end, stop))
        return out

    def spelled(self, text: str) -> list[tuple[int, int]]:
        """Where a text spells an added token, by its characters or by what the tokenizer would make of it."""
        spans = [m.span() for m in self._spelled.finditer(text)]
        if self._normalizes:
            spans += [(c.inner, c.end) for c in self.split(text)]
        out: list[tuple[int, int]] = []
        for start, stop in sorted(spans):
            if out and start < out[-1][1]:
                out[-1] = (out[-1][0], max(stop, out[-1][1]))
            else:
                out.append((start, stop))
        return out

    def partial(self, text: str) -> list[tuple[int, int]]:
        """Where a text begins or ends with a part of an added token, or is nothing but a part of one."""
        bare = text.strip()
        start, most = text.find(bare), min(len(bare), self._longest)
        if bare and len(bare) < self._longest and any(bare in token for token in self.tokens):
            return [(start, start + len(bare))]
        head = next((n for n in range(most, 0, -1) if bare[:n] in self._tails), 0)
        tail = next((n for n in range(most, 0, -1) if bare[len(bare) - n :] in self._heads), 0)
        spans = [(start, start + head), (start + max(head, len(bare) - tail), start + len(bare))]
        return [(a, b) for a, b in spans if a < b and (a > start or head)]

    def starts_one(self, text: str) -> bool:
        """Whether a text holds the first character of an added token."""
        return self._first.search(text) is not None

    def without_first(self, text: str, other: str) -> str:
        """A text in which `other` stands for each first character of an added token."""
        return self._first.sub(other, text)


def _as_is(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


class Lost(Exception):
    """A text did not come out of the rendering as it went in."""


class Hidden:
    """The strings of one chat with placeholders for what spells control tokens.

    Args:
        avoid: text whose characters no placeholder may have.
    """

    def __init__(
        self, splitter: Splitter, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], avoid: str = ""
    ) -> None:
        self._splitter = splitter
        self._texts: list[str] = []
        self.names: list[str] = []  # of the twin's tool calls
        self._once: set[int] = set()  # placeholders that must come out once: those of whole tokens
        taken = set(_PRIVATE.findall(avoid))
        for text in strings([messages, tools]):
            taken.update(_PRIVATE.findall(text))
        free = (chr(c) for c in _POOL if chr(c) not in taken)
        self._open, self._close, self._other, *self._digits = (next(free) for _ in range(13))
        mine = "".join((self._open, self._close, *self._digits))
        self._placeholder = re.compile(f"{self._open}([{''.join(self._digits)}]+){self._close}")
        self._stray = re.compile(f"[{mine}]")
        self.messages: list[dict[str, Any]] = [
            {key: value if key == "role" else self._hide(value, parts=True) for key, value in message.items()}
            for message in messages
        ]
        # the words of a JSON schema steer a template, and stand in quotes: only whole tokens are hidden
        self.tools: list[Any] = [self._hide(tool, parts=False) for tool in tools]
        self._suspect = any(map(splitter.starts_one, strings([list(m.values()) for m in self.messages])))

    def twin(self) -> list[dict[str, Any]] | None:
        """Messages to compare with; None where there is nothing to see in them.

        They hold no first character of an added token: a template that takes something out of a text could join what is
        left to a token, and their rendering then has fewer. And each tool call has a name of its own (`names`), so that
        one that is not written shows.
        """
        if not self._suspect and not any(m.get("tool_calls") for m in self.messages):
            return None

        def change(text: str) -> str:
            return self._splitter.without_first(text, self._other)

        out = [{k: v if k == "role" else _map(v, change) for k, v in message.items()} for message in self.messages]
        for call in (call for message in out for call in message.get("tool_calls", ())):
            self.names.append(f"{self._other}{self._digits[0] * len(self.names)}{self._close}")
            call["function"]["name"] = self.names[-1]
        return out

    def restore(self, text: str) -> str:
        """A part of a rendering with its texts put back.

        Raises:
            Lost: it holds a piece of a placeholder.
        """
        if not self._texts:
            return text
        text = self._placeholder.sub(lambda m: self._texts[self._number(m)], text)
        if self._stray.search(text):
            raise Lost
        return text

    def check(self, text: str) -> None:
        """Sees to it that each text that spells a control token is in a rendering once.

        Raises:
            Lost: it is not.
        """
        if self._texts:
            times = Counter(map(self._number, self._placeholder.finditer(text)))
            if any(times[n] != 1 for n in self._once):
                raise Lost

    def _number(self, found: re.Match[str]) -> int:
        return int("".join(str(self._digits.index(c)) for c in found[1]))

    def _hide(self, value: Any, parts: bool) -> Any:
        if isinstance(value, str):
            return self._hide_text(value, parts)
        if isinstance(value, Mapping):
            return {
                self._hide_text(str(k), parts=False): self._hide(v, parts and (k, v) != STRUCTURE)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide(v, parts) for v in value]
        return value

    def _hide_text(self, text: str, parts: bool) -> str:
        whole = self._splitter.spelled(text)
        spans = {span: True for span in whole}
        if parts:
            for start, stop in self._splitter.partial(text):
                if not any(start < b and a < stop for a, b in whole):
                    spans[start, stop] = False
        for (start, stop), once in sorted(spans.items(), reverse=True):
            if once:
                self._once.add(len(self._texts))
            digits = "".join(self._digits[int(d)] for d in str(len(self._texts)))
            self._texts.append(text[start:stop])
            text = f"{text[:start]}{self._open}{digits}{self._close}{text[stop:]}"
        return text


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if (k, v) == STRUCTURE else _map(v, change) for k, v in value.items()}
    return [_map(v, change) for v in value] if isinstance(value, list | tuple) else value
