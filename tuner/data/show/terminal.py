"""Rows to show -> text for a terminal, with colours or, just as readable, without.

Nothing of the data reaches the terminal as it is: what a terminal could take for a command is written as its code.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from tuner.data.show import Look, RowView, Sample, Section
from tuner.data.show.cells import Cell, clean, turns, visible

RESERVED = "«»·×⟨⟩⟦⟧↵⇥"  # marks of ours, which without colours only their code can stand for in the data
# Colour says whether a token is trained, and underlines of every other token show where tokens meet.
STYLES = {
    "trained": "color(157) on color(22)",
    "trained control": "bold color(218) on color(22)",
    "control": "color(133)",
    "text": "",
    "cut": "strike bright_black",
}
LEGEND = (
    "«trained»  not trained  <|control|>  ·: where two tokens meet  ↵: newline  ⟨U+200B⟩: a character one cannot see, "
    "or one of these marks  ⟦cut⟧  ×0.5: weight"
)


def write(look: Look, out: TextIO, color: bool) -> None:
    """Writes the rows to `out`; with `color` in ANSI colours."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    # a terminal may call itself dumb or be a file: who asks for colours gets 256 of them
    console = Console(
        file=out, force_terminal=color, no_color=not color, color_system="256" if color else None, highlight=False
    )
    for line in lines(look, color):
        console.print(line, soft_wrap=True)


def wants_color(out: TextIO) -> bool:
    """Whether `out` is a terminal that knows colours and nobody has asked for none (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def lines(look: Look, color: bool) -> Iterator[Text]:
    """The lines of all rows. Without `color` they have no styles and marks take their place."""
    yield _legend() if color else Text(LEGEND)
    for note in look.notes:
        yield Text(f"note: {clean(note)}")
    for view in look.rows:
        yield Text()
        yield from _row(view, look, color)


def _legend() -> Text:
    text = Text()
    for name, style in (
        ("trained", "trained"),
        ("not trained", "text"),
        ("control", "control"),
        ("control, trained", "trained control"),
        ("cut", "cut"),
    ):
        text.append(name, STYLES[style]).append("  ")
    return text.append("every other token is underlined; ↵ newline, ⟨U+200B⟩ a character one cannot see, ×0.5 weight")


def _row(view: RowView, look: Look, color: bool) -> Iterator[Text]:
    yield Text(clean(view.title), "bold" if color else "")
    if view.problem:
        yield Text(f"  not used: {clean(view.problem)}", "bold red" if color else "")
    yield from _facts(view.facts)
    for note in view.notes:
        yield Text(f"  note: {clean(note)}")
    for number, sample in enumerate(view.samples, 1):
        if len(view.samples) > 1:
            yield Text(f"-- piece {number} of {len(view.samples)}")
        yield from _sample(sample, look, color)
    if view.raw:
        yield Text()
        yield _marked(view.raw, color)


def _facts(facts: Sequence[tuple[str, str]]) -> Iterator[Text]:
    for name, value in facts:
        yield Text(f"  {name:<12} {clean(value)}")


def _sample(sample: Sample, look: Look, color: bool) -> Iterator[Text]:
    yield from _facts(sample.facts)
    ended = False  # whether the last line ended in a newline of the text
    for section in sample.sections:
        if not ended:
            yield Text()
        if section.name:
            yield Text(_heading(section), "bold" if color else "")
        at = 0
        for turn in turns(section.cells, look.ends):
            yield _turn(turn, at, color)
            at += len(turn)
            ended = turn[-1].text.endswith("\n")


def _heading(section: Section) -> str:
    return f"-- {section.name}: {section.num_tokens:,} tokens, {section.num_trained:,} trained"


def _marked(text: str, color: bool) -> Text:
    """Text as it is, but for what one cannot see."""
    out = Text()
    for shown, mark in visible(text, "" if color else RESERVED):
        out.append(shown.replace("↵\n", "\n") if mark else shown, "dim" if color and mark else "")
    return out


def _turn(cells: Sequence[Cell], at: int, color: bool) -> Text:
    """The cells of one turn on a line of their own; `at` is the number of the first, which decides its underline."""
    out = Text()
    before: Cell | None = None
    for n, cell in enumerate(cells, at):
        same = before is not None and _run(before) == _run(cell)
        if not same:
            _close(out, before, color)
            out.append("" if color else _OPEN.get(_run(cell)[0], ""))
        elif not color and before is not None and not before.control and not cell.control:
            out.append("·")
        style = f"{_style(cell)} underline" if n % 2 else _style(cell)
        for shown, mark in visible(cell.text, "" if color or cell.control else RESERVED):
            out.append(shown, (f"dim {style}" if mark else style) if color else "")
        before = cell
    _close(out, before, color)
    return out


_OPEN, _SHUT = {"trained": "«", "cut": "⟦"}, {"trained": "»", "cut": "⟧"}


def _run(cell: Cell) -> tuple[str, float]:
    return "cut" if cell.cut else "trained" if cell.trained else "", cell.weight


def _close(out: Text, cell: Cell | None, color: bool) -> None:
    if cell is None:
        return
    out.append("" if color else _SHUT.get(_run(cell)[0], ""))
    if cell.trained and cell.weight != 1:
        out.append(f"×{cell.weight:g}", "italic dim" if color else "")


def _style(cell: Cell) -> str:
    if cell.cut:
        return STYLES["cut"]
    if cell.trained:
        return STYLES["trained control" if cell.control else "trained"]
    return STYLES["control" if cell.control else "text"]
