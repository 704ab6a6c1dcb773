"""Rows to show -> one HTML page that needs nothing but itself: no script, no font, no picture, no network.

All text of the data goes through `html.escape`, and the page's own policy forbids whatever could load or run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

from tuner.data.show import Look, RowView, Sample, Section
from tuner.data.show.cells import Cell, clean, turns, visible
from tuner.errors import RunDirError

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #24292e; --soft: #686f77; --line: #e1e2de;
  --text: #f3f3f0; --text2: #e9e9e4;
  --trained: #c5ecd0; --trained2: #aee0bd; --trained-ink: #0d3b20;
  --control: #7d4a9e; --control-bg: #f4ecf9; --trained-control: #6a2c91;
  --cut: #9a9a94; --bad: #a3232b; --bad-bg: #fdeeee; --note-bg: #fdf7e3; --note: #6f5500;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --ink: #dfe2e6; --soft: #959da6; --line: #31353b;
    --text: #262a2f; --text2: #2f343a;
    --trained: #1c4a30; --trained2: #255c3d; --trained-ink: #d3f5df;
    --control: #cba2e6; --control-bg: #2e2436; --trained-control: #e6c5fa;
    --cut: #787d84; --bad: #ff9c9c; --bad-bg: #3a2023; --note-bg: #332c17; --note: #ebd489;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.15rem; margin: 0 0 .9rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0; padding: .5rem .9rem; font-weight: 600; border-bottom: 1px solid var(--line);
  display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
h3 small { font-weight: 400; color: var(--soft); font-size: .85rem; }
nav { margin: 0 0 1rem; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav a, h2 a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
.legend { list-style: none; margin: 0 0 1.25rem; padding: .6rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; display: flex; flex-wrap: wrap; gap: .45rem 1.25rem;
  font-size: .85rem; color: var(--soft); align-items: baseline; }
.legend .t { margin-right: .15rem; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem 1.25rem;
  margin: 0 0 1.5rem; }
.problem, .notes { margin: .7rem 0 0; padding: .5rem .9rem; border-radius: 6px; overflow-wrap: anywhere;
  font-size: .92rem; list-style: none; }
main > .notes { margin: 0 0 1.25rem; padding-inline: 1.25rem; }
.problem { background: var(--bad-bg); color: var(--bad); }
.notes { background: var(--note-bg); color: var(--note); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
.facts { margin: .8rem 0 0; font-size: .9rem; }
.pair + .bar { margin-top: 1.1rem; }
.pair .facts + .facts { margin-top: .8rem; }
article { margin-top: 1.2rem; }
article h3 { padding-inline: 0; }
.facts div { display: flex; gap: 1rem; }
.facts dt { color: var(--soft); flex: 0 0 5.6rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.bar { display: flex; height: 6px; border-radius: 3px; overflow: hidden; margin: .9rem 0 1rem;
  background: var(--text2); }
.bar i { display: block; }
.bar .trained { background: #3f9f63; } .bar .control { background: #a678c4; } .bar .cut { background: var(--cut); }
.bar .text { background: var(--text2); }
.tokens { border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
.branches { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem;
  margin-top: .8rem; }
.turn, pre { margin: 0; padding: .5rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.85 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace; }
.turn + .turn { border-top: 1px dashed var(--line); }
.t { background: var(--text); padding: .16em 0; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.t:nth-of-type(even) { background: var(--text2); }
.t.trained { background: var(--trained); color: var(--trained-ink); }
.t.trained:nth-of-type(even) { background: var(--trained2); }
.t.control { background: var(--control-bg); color: var(--control); border-radius: 4px; font-size: .9em;
  padding: .16em .25em; margin: 0 1px; }
.t.control.trained { background: var(--trained2); color: var(--trained-control); font-weight: 600; }
.t.cut { background: none; color: var(--cut); text-decoration: line-through; }
.t:hover { outline: 1.5px solid currentColor; outline-offset: -1px; border-radius: 3px; }
.mark { opacity: .5; font-style: normal; font-size: .95em; }
.weight { font-size: .72em; color: var(--trained-control); margin-left: .2em; vertical-align: .35em; line-height: 0; }
@media print { .row { break-inside: avoid; } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LEGEND = (
    ("t trained", "trained", "the loss counts it"),
    ("t", "text", "read, not trained"),
    ("t control", "&lt;|control|&gt;", "control token"),
    ("t control trained", "&lt;|control|&gt;", "control token, trained"),
    ("t cut", "cut", "lost to data.max_length"),
    ("mark", "↵", "newline"),
    ("mark", "⟨U+200B⟩", "a character one cannot see"),
    ("weight", "×0.5", "weight in the loss"),
)


def check(file: Path) -> None:
    """Refuses a page that is there; raises RunDirError."""
    if os.path.lexists(file):  # false, where Path.exists raises: a name that is too long
        raise RunDirError(f"'{file}' exists; give another --html, or move it away")


def write(look: Look, file: Path) -> None:
    """Writes the page to a file that does not exist yet, and makes its folder; raises RunDirError."""
    text = page(look)
    check(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"--html: the folder of '{file}' cannot be made: {error.strerror}") from None
    try:
        with file.open("x", encoding="utf-8") as stream, _whole_or_none(file):
            stream.write(text)
            stream.flush()
    except OSError as error:
        raise RunDirError(f"--html: '{file}' cannot be written: {error.strerror}; give another file") from None


@contextmanager
def _whole_or_none(file: Path) -> Iterator[None]:
    """Removes a page that could not be written to its end, as on a full disk or where a signal came."""
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def page(look: Look) -> str:
    """The page as text."""
    return "\n".join(_page(look)) + "\n"


def _page(look: Look) -> Iterator[str]:
    title = " · ".join(clean(view.title) for view in look.rows[:1])
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    yield "<h1>What the model is trained on, token by token</h1>"
    yield '<ul class="legend">'
    for style, sample, meaning in _LEGEND:
        yield f'<li><span class="{style}">{sample}</span> {meaning}</li>'
    yield "</ul>"
    if len(look.rows) > 1:
        yield '<nav aria-label="rows">'
        for view in look.rows:
            yield f'<a href="#row-{view.row + 1}">{escape(clean(view.title))}</a>'
        yield "</nav>"
    yield from _notes(look.notes)
    for view in look.rows:
        yield from _row(view, look)
    yield "</main>\n</body>\n</html>"


def _row(view: RowView, look: Look) -> Iterator[str]:
    anchor = f"row-{view.row + 1}"
    yield f'<section class="row" id="{anchor}">\n<h2><a href="#{anchor}">{escape(clean(view.title))}</a></h2>'
    if view.problem:
        yield f'<p class="problem">Not used: {escape(clean(view.problem))}</p>'
    yield from _notes(view.notes)
    one = view.samples[0].facts if len(view.samples) == 1 else ()
    yield f'<div class="pair">{_facts(view.facts)}{_facts(one)}</div>'
    for number, sample in enumerate(view.samples, 1):
        if len(view.samples) > 1:
            yield f'<article id="{anchor}-{number}">\n<h3>piece {number} of {len(view.samples)}</h3>'
            yield _facts(sample.facts)
        yield from _sample(sample, look)
        if len(view.samples) > 1:
            yield "</article>"
    if view.raw:
        yield f"<pre>{_marked(view.raw, newline=False)}</pre>"
    yield "</section>"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield f'<ul class="notes">{"".join(f"<li>{escape(clean(note))}</li>" for note in notes)}</ul>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(clean(value))}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def _sample(sample: Sample, look: Look) -> Iterator[str]:
    yield _bar(sample)
    trunk, *branches = sample.sections
    if trunk.cells:
        yield from _section(trunk, look)
    if branches:
        yield '<div class="branches">'
        for branch in branches:
            yield from _section(branch, look)
        yield "</div>"


def _bar(sample: Sample) -> str:
    """The shares of what is trained, read, control and cut, as a line of colours."""
    counts = dict.fromkeys(("trained", "control", "text", "cut"), 0)
    for section in sample.sections:
        for cell in section.cells:
            kind = "cut" if cell.cut else "trained" if cell.trained else "control" if cell.control else "text"
            counts[kind] += len(cell.ids)
    parts = "".join(f'<i class="{k}" style="flex:{n}" title="{n:,} {k}"></i>' for k, n in counts.items() if n)
    return f'<div class="bar">{parts}</div>'


def _section(section: Section, look: Look) -> Iterator[str]:
    yield '<div class="tokens">'
    if section.name:
        counts = f"{section.num_tokens:,} tokens, {section.num_trained:,} trained"
        yield f"<h3>{escape(section.name)} <small>{counts}</small></h3>"
    for turn in turns(section.cells, look.ends):
        yield f'<div class="turn">{"".join(_turn(turn))}</div>'
    yield "</div>"


def _turn(cells: Sequence[Cell]) -> Iterator[str]:
    for n, cell in enumerate(cells):
        names = ("t", "control" * cell.control, "trained" * cell.trained, "cut" * cell.cut)
        style = " ".join(name for name in names if name)
        yield f'<span class="{style}" title="{escape(_hover(cell))}">{_marked(cell.text)}</span>'
        following = cells[n + 1] if n + 1 < len(cells) else None
        if cell.trained and cell.weight != 1 and (following is None or following.weight != cell.weight):
            yield f'<sup class="weight">×{cell.weight:g}</sup>'


def _hover(cell: Cell) -> str:
    ids = ", ".join(map(str, cell.ids))
    parts = [f"id {ids}" if len(cell.ids) == 1 else f"ids {ids}"]
    parts.append(f"position {cell.at}")
    parts.append("cut" if cell.cut else "trained" if cell.trained else "not trained")
    if cell.control:
        parts.append("control token")
    if cell.trained and cell.weight != 1:
        parts.append(f"weight {cell.weight:g}")
    return ", ".join(parts)


def _marked(text: str, newline: bool = True) -> str:
    """Escaped text, with what one cannot see as marks; a newline is only a line break where `newline` is false."""
    out = []
    for shown, mark in visible(text):
        shown = escape(shown if newline else shown.replace("↵\n", "\n"))
        out.append(f'<i class="mark">{shown}</i>' if mark else shown)
    return "".join(out)
