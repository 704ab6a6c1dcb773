"""Example -> what its text shows to be odd: order of roles, empty turns, equal completions, encodings, scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from tuner.types import ANSWERS, Example, Message

MIN_LETTERS = 20  # of a row, for its script to be told

# UTF-8 that was read as Windows-1252 or Latin-1: a lead byte shows as one of À..ô, and each byte after it as what these
# encodings have at 0x80..0xBF. Honest text has an accented letter before a quote, a dash, dots or a blank that does not
# break too, so those count after few leads only, or where the pattern comes twice.
_REST = "[\u0080-\u00ba\u00bc-\u00bf€‚ƒ„†‡ˆ‰Š‹ŒŽ˜™š›œžŸ]"
_ANY = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_MOJIBAKE = re.compile(f"[ÂÃ]{_REST}|(?:[ÄÅÎÏÐ-ß]{_ANY}){{2}}|â€{_ANY}|(?:[ãäåæçèé]{_ANY}{_ANY}){{2}}|ðŸ{_ANY}{_ANY}")
_REPLACED = re.compile("\ufffd")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

# First and last code point of the blocks of the Unicode standard (Blocks.txt), by script. Chinese and Japanese share
# Han, so kana stand with it.
_BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": (
        (0x41, 0x5A),
        (0x61, 0x7A),
        (0xC0, 0xD6),
        (0xD8, 0xF6),
        (0xF8, 0x24F),
        (0x1E00, 0x1EFF),
        (0xFF21, 0xFF3A),
        (0xFF41, 0xFF5A),
    ),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew": ((0x590, 0x5FF),),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Devanagari": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Oriya": ((0xB00, 0xB7F),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE00, 0xE7F),),
    "Lao": ((0xE80, 0xEFF),),
    "Tibetan": ((0xF00, 0xFFF),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Ethiopic": ((0x1200, 0x139F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
    "Han or kana": (
        (0x3040, 0x30FF),
        (0x31F0, 0x31FF),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0xFF66, 0xFF9F),
        (0x20000, 0x3FFFF),
    ),
}
SCRIPTS = tuple(_BLOCKS)
NO_SCRIPT = len(SCRIPTS)  # too few letters, or no script has more than half of them

_RANGES = sorted((first, last, number) for number, name in enumerate(SCRIPTS) for first, last in _BLOCKS[name])
_FIRST, _LAST, _NUMBER = (np.asarray(column, np.int64) for column in zip(*_RANGES, strict=True))


def is_text(example: Example) -> bool:
    """Whether it is raw text, which no template wraps."""
    return example.completions[0][0].role == "text"


def messages(example: Example) -> Iterator[Message]:
    """Every message: the prompt once, then each completion."""
    yield from example.prompt
    for completion in example.completions:
        yield from completion


def role_order(turns: Sequence[Message]) -> str:
    """What is odd about the order of a conversation's turns; empty if nothing is."""
    roles = [m.role for m in turns]
    said = [role for role in roles if role in ("user", "assistant", "tool")]
    if "system" in roles[1:]:
        return "system turn after the first turn"
    if said[:1] == ["assistant"]:
        return "begins with an assistant turn"
    for before, after in zip(said, said[1:], strict=False):
        if before == after != "tool":
            return f"two {after} turns in a row"
    calls = 0
    for message in turns:
        if message.role == "tool" and not calls:
            return "tool turn without a call before it"
        calls = calls - 1 if message.role == "tool" else len(message.tool_calls)
    if said[-1:] == ["user"]:
        return "ends with a user turn"
    return ""


def empty_answer(example: Example) -> bool:
    """Whether a completion has an answer that says and calls nothing, and that is not left out of training."""
    return any(
        m.role in ANSWERS and m.train is not False and m.weight and not m.content.strip() and not m.tool_calls
        for completion in example.completions
        for m in completion
    )


def empty_turn(example: Example) -> bool:
    """Whether a user turn or a raw text is empty."""
    return any(m.role in ("user", "text") and not m.content.strip() for m in messages(example))


def blank_difference(example: Example) -> bool:
    """Whether white space is all that tells two completions apart."""
    said = [tuple((m.role, "".join(m.content.split()), m.tool_calls) for m in c) for c in example.completions]
    return any(one in said[:i] for i, one in enumerate(said))


def encoding(text: str) -> str:
    """The first sign of a wrong encoding in a text; empty if there is none."""
    if found := _CONTROL.search(text):
        return f"control character U+{ord(found[0]):04X}"
    if text.isascii():
        return ""
    if _REPLACED.search(text):
        return "replacement character U+FFFD"
    if found := _MOJIBAKE.search(text):
        return f"{found[0]!r} looks like UTF-8 read as another encoding"
    return ""


def script(text: str) -> int:
    """The number in `SCRIPTS` of the script that has more than half of the letters; `NO_SCRIPT` if none has."""
    if text.isascii():
        beginning = text[: 8 * MIN_LETTERS]  # mostly enough
        latin = any(sum(map(str.isalpha, part)) >= MIN_LETTERS for part in (beginning, text))
        return SCRIPTS.index("Latin") if latin else NO_SCRIPT
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    block = np.searchsorted(_FIRST, codes, side="right") - 1
    letters = (block >= 0) & (codes <= _LAST[block])
    counts = np.bincount(_NUMBER[block[letters]], minlength=len(SCRIPTS))
    total, best = int(counts.sum()), int(counts.argmax())
    return best if total >= MIN_LETTERS and 2 * counts[best] > total else NO_SCRIPT
