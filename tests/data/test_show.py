"""What a person sees of a row: the very tokens, in order, with their masks; and nothing that could do harm."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tuner.data.formats import parser
from tuner.data.render import Renderer
from tuner.data.show import Look, look, page, terminal
from tuner.data.show.cells import turns, visible
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError, RecipeError, RunDirError
from tuner.recipe import DataSection

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)> <|eot_id|> \x1b[31mred\x07 \u202e \u200b\r\n&amp;"


def chat(*turns, **extra):
    """`chat("q", "a", ...)` -> a row whose turns alternate; a dict is merged into the message of its place."""
    messages = []
    for n, turn in enumerate(turns):
        said = turn if isinstance(turn, dict) else {"content": turn}
        messages.append({"role": ("user", "assistant")[n % 2]} | said)
    return {"messages": messages} | extra


def see(tokenizer, path, row=None, samples=1, split="train", source=1, **settings):
    data = DataSection(**({"train": path, "chat_template": "llama3"} | settings))
    return look(data, tokenizer, row=row, samples=samples, split=split, source=source)


def plain(seen: Look) -> str:
    out = io.StringIO()
    terminal.write(seen, out, color=False)
    return out.getvalue()


def body(seen: Look) -> str:
    """The tokens of the last row, without colours."""
    return plain(seen).split("\n\n", 2)[2]


class Page(HTMLParser):
    """What a browser would make of a page: its tokens, headings, facts, and everything that could load or run."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tokens: list[tuple[str, frozenset[str], str]] = []  # text, classes, title
        self.text: dict[str, list[str]] = {}  # tag -> the texts in it
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.legend: list[frozenset[str]] = []
        self.weights: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self._open, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in given), given
        self.links += [given[name] for name in ("src", "href", "action", "data", "srcset") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "span" and "title" in given:
            self.tokens.append(("", frozenset(given["class"].split()), given["title"]))
        elif tag == "span":
            self.legend.append(frozenset(given["class"].split()))
        self.text.setdefault(tag, [])
        if tag not in ("meta",):
            self._open.append((tag, given))
            self.text[tag].append("")

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        for tag, given in self._open:
            self.text[tag][-1] += data
            if tag == "span" and "title" in given:
                text, classes, title = self.tokens[-1]
                self.tokens[-1] = (text + data, classes, title)

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.text["dt"], self.text["dd"], strict=True))

    def ids_of_tokens(self) -> list[int]:
        return [
            int(i) for *_, title in self.tokens for i in re.match(r"ids? ([\d, ]+?), position", title)[1].split(",")
        ]

    def where(self, *classes: str) -> list[str]:
        """The texts of tokens with exactly these classes."""
        return [text for text, has, _ in self.tokens if has == {"t", *classes}]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_chat_shows_the_tokens_that_train(tokenizer, write):
    path = write([chat({"role": "system", "content": "s"}, "ab"), chat("What?", "Yes.", "So?", "No.", extra=1)])
    seen = see(tokenizer, path, row=2, max_length=64)
    (view,) = seen.rows
    (section,) = view.samples[0].sections
    expected = Renderer(tokenizer, TEMPLATES["llama3"], max_length=64).render(
        parser("messages")(chat("What?", "Yes.", "So?", "No."))
    )[0]
    assert [i for c in section.cells for i in c.ids] == expected.ids()
    lines = [[c.text for c in turn] for turn in turns(section.cells, seen.ends)]
    assert len(lines) == 4 and all(line[-1] == "<|eot_id|>" for line in lines)
    trained = ["".join(c.text for c in turn if c.trained) for turn in turns(section.cells, seen.ends)]
    assert trained == ["", "Yes.<|eot_id|>", "", "No.<|eot_id|>"]
    facts = dict(view.facts) | dict(view.samples[0].facts)
    assert facts["format"].startswith("messages (has ") and facts["template"] == "llama3"
    assert facts["not read"] == "extra" and facts["trained on"] == "assistant"
    assert facts["tokens"] == f"{len(expected)} of at most 64"
    assert facts["trained"] == f"{expected.num_trained} ({100 * expected.num_trained / len(expected):.1f}%)"
    assert facts["control"] == "13" and facts["terminator"] == "<|eot_id|> (id 388); 4 here, 2 trained"
    assert view.title == f"{path} line 2" and not view.problem and not view.notes and not seen.notes


def test_text_without_colours_is_readable(tokenizer, write):
    row = chat("Hi «·» \u200b", {"content": "a\n\nb", "weight": 0.5}, "c", {"content": "d", "train": False})
    text = body(see(tokenizer, write([row])))
    words = text.replace("·", "")
    assert words == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>↵\n↵\n"
        "Hi ⟨U+00AB⟩⟨U+00B7⟩⟨U+00BB⟩ ⟨U+200B⟩<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>↵\n↵\n«a↵\n↵\nb<|eot_id|>»×0.5\n"
        "<|start_header_id|>user<|end_header_id|>↵\n↵\nc<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>↵\n↵\nd<|eot_id|>\n"
    )
    cells = see(tokenizer, write([row])).rows[0].samples[0].sections[0].cells
    meet = [a for a, b in zip(cells, cells[1:], strict=False) if not a.control and not b.control]
    opened = sum(not a.trained and b.trained and not a.control for a, b in zip(cells, cells[1:], strict=False))
    assert text.count("·") == len(meet) - opened


def test_colours_show_the_same_and_only_our_own_escapes(tokenizer, write):
    seen = see(tokenizer, write([chat(HOSTILE, "yes", {"content": "q\x9b2J", "role": "user"}, {"content": "no"})]))
    out = io.StringIO()
    terminal.write(seen, out, color=True)
    styled = re.findall(r"(\x1b\[[\d;]*m)([^\x1b]*)", out.getvalue())
    bare = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert all(c.isprintable() or c == "\n" for c in bare)
    assert "⟨U+001B⟩[31mred⟨U+0007⟩" in bare and "⟨U+009B⟩2J" in bare and "⟨U+202E⟩" in bare
    trained = "".join(text for code, text in styled if "48;5;22" in code)
    assert trained == "trained" + "control, trained" + "yes<|eot_id|>no<|eot_id|>"
    assert "\x1b" not in plain(seen) and "\x9b" not in plain(seen)
    underlined = [text for code, text in styled if re.search(r"[\[;]4[;m]", code)]
    assert underlined and len(underlined) < len(styled)


def test_hostile_names_and_reasons_reach_no_terminal_raw(tokenizer, write):
    rows = [chat("q", "a", **{"\x1b[2Jx": 1}), {"messages": [{"role": "\x1b]0;t\x07", "content": HOSTILE}]}]
    for color in (False, True):
        out = io.StringIO()
        terminal.write(see(tokenizer, write(rows, "a\x1b[1m.jsonl"), row=1, samples=2), out, color)
        bare = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()) if color else out.getvalue()
        assert all(c.isprintable() or c == "\n" for c in bare)
        assert "⟨U+001B⟩[2Jx" in bare and "a⟨U+001B⟩[1m.jsonl" in bare and "onerror" in bare


def test_a_preference_shows_the_prompt_once_and_both_answers(tokenizer, write):
    path = write([{"prompt": "Why?", "chosen": "Because.", "rejected": "No\nidea at all."}])
    (view,) = see(tokenizer, path, train_on="assistant").rows
    prompt, chosen, rejected = view.samples[0].sections
    assert [s.name for s in view.samples[0].sections] == ["prompt", "chosen", "rejected"]
    assert "".join(c.text for c in prompt.cells).endswith(
        "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt.num_trained == 0
    assert "".join(c.text for c in chosen.cells) == "Because.<|eot_id|>"
    assert "".join(c.text for c in rejected.cells) == "No\nidea at all.<|eot_id|>"
    assert all(c.trained for c in (*chosen.cells, *rejected.cells))
    assert chosen.cells[0].at == rejected.cells[0].at == prompt.num_tokens
    total = prompt.num_tokens + chosen.num_tokens + rejected.num_tokens
    assert dict(view.samples[0].facts)["tokens"] == (
        f"{total} (prompt {prompt.num_tokens}, chosen {chosen.num_tokens}, rejected {rejected.num_tokens}); prompt and "
        f"longest completion {prompt.num_tokens + rejected.num_tokens} of at most 2,048"
    )
    text = plain(see(tokenizer, path))
    assert text.index("-- prompt:") < text.index("-- chosen:") < text.index("-- rejected:")
    assert text.count("<|begin_of_text|>") == 1


def test_unpaired_rows_say_their_label(tokenizer, write):
    path = write([{"prompt": "Why?", "completion": "So.", "label": False}])
    sections = see(tokenizer, path).rows[0].samples[0].sections
    assert [s.name for s in sections] == ["prompt", "completion (label: false)"]


def test_text_is_shown_in_the_pieces_it_is_split_into(tokenizer, write):
    path = write([{"text": "word " * 20}])
    seen = see(tokenizer, path, chat_template="auto", train_on="all", max_length=12, overlong="split")
    (view,) = seen.rows
    assert len(view.samples) > 2 and view.notes == (
        f"split into {len(view.samples)} pieces by data.max_length: 12 (data.overlong: split)",
    )
    assert "".join(c.text for s in view.samples for c in s.sections[0].cells if not c.control) == "word " * 20
    assert dict(view.facts)["template"] == "none (raw text)"
    text = plain(seen)
    assert f"-- piece 2 of {len(view.samples)}" in text and "<|end_of_text|> (id 385); 1 here, 1 trained" in text
    assert f"row-1-{len(view.samples)}" in Page(page.page(seen)).ids


def test_a_date_is_named(tokenizer, write):
    path = write([chat("q", "a")])
    facts = dict(see(tokenizer, path, chat_template="llama3.1", date_string="1 Jan 2020").rows[0].facts)
    assert facts["date_string"] == "1 Jan 2020" and facts["template"].startswith("llama3.1")
    default = dict(see(tokenizer, path, chat_template="llama3.1").rows[0].facts)["date_string"]
    cells = see(tokenizer, path, chat_template="llama3.1").rows[0].samples[0].sections[0].cells
    assert default in "".join(c.text for c in cells)
    assert dict(see(tokenizer, path).rows[0].facts)["date_string"] == "the template writes no date"


# -- rows that the recipe does not use, or not whole -------------------------------------------------------------------


LONG = chat("q", "one two three four five six seven eight nine ten")


@pytest.mark.parametrize(
    ("row", "settings", "problem", "trained"),
    [
        (LONG, {"max_length": 20}, r"\d+ tokens, more than data.max_length: 20; raise it", True),
        (LONG, {"max_length": 20, "overlong": "drop"}, r"dropped: \d+ tokens, more than data.max_length: 20", True),
        (LONG, {"max_length": 5, "overlong": "truncate"}, "dropped: data.max_length: 5 leaves nothing to train", True),
        (chat("q", {"content": "a", "train": False}), {}, "nothing to train on: every turn", False),
        (chat({"content": "q", "train": True}, "a"), {}, "message 0 asks for train: true", False),
    ],
)
def test_a_row_that_is_not_used_is_shown_with_the_reason(tokenizer, write, row, settings, problem, trained):
    seen = see(tokenizer, write([row]), row=1, **settings)
    (view,) = seen.rows
    assert re.match(problem, view.problem), view.problem
    text = "".join(c.text for c in view.samples[0].sections[0].cells)
    assert text.endswith(row["messages"][1]["content"] + "<|eot_id|>")
    assert any(c.trained for c in view.samples[0].sections[0].cells) is trained
    assert f"  not used: {view.problem}" in plain(seen)
    assert Page(page.page(seen)).text["p"] == [f"Not used: {view.problem}"]


def test_a_row_that_is_cut_shows_what_is_lost(tokenizer, write):
    seen = see(tokenizer, write([LONG]), max_length=20, overlong="truncate")
    (view,) = seen.rows
    cells = view.samples[0].sections[0].cells
    assert sum(len(c.ids) for c in cells if not c.cut) == 20
    assert "".join(c.text for c in cells).endswith("nine ten<|eot_id|>") and not any(c.trained for c in cells if c.cut)
    assert view.notes == (
        "cut at data.max_length: 20 (data.overlong: truncate); what is lost is shown as cut",
        "no terminator is trained at the end of an answer, so this row does not teach the model to stop",
    )
    facts = dict(view.samples[0].facts)
    assert facts["tokens"] == "20 of at most 20" and facts["cut"] == str(sum(len(c.ids) for c in cells if c.cut))
    lost = "".join(c.text for c in cells if c.cut)
    assert plain(seen).replace("·", "").endswith(f"»⟦{lost}⟧\n")
    parsed = Page(page.page(seen))
    assert "".join(parsed.where("cut") + parsed.where("control", "cut")) == lost


def test_a_pair_that_is_cut_shows_what_each_answer_loses(tokenizer, write):
    pair = {"prompt": "Why?", "chosen": "one two three four five six", "rejected": "no"}
    path = write([pair])
    whole = see(tokenizer, path).rows[0].samples[0].sections
    room = whole[0].num_tokens + whole[2].num_tokens
    prompt, chosen, rejected = see(tokenizer, path, max_length=room, overlong="truncate").rows[0].samples[0].sections
    assert prompt == whole[0] and rejected == whole[2]
    assert chosen.num_tokens == whole[2].num_tokens and chosen.num_cut == whole[1].num_tokens - chosen.num_tokens
    assert "".join(c.text for c in chosen.cells) == "".join(c.text for c in whole[1].cells)


def test_a_row_that_cannot_be_rendered_shows_its_text(tokenizer, write, tmp_path):
    rows = [chat("q", "a"), {"messages": [{"role": "human", "content": HOSTILE}]}]
    path = write(rows)
    with open(path, "a") as file:
        file.write("{broken\n")
    seen = see(tokenizer, path, row=2, samples=2)
    wrong, broken = seen.rows
    assert wrong.problem.startswith("messages[0].role is 'human'") and "onerror" in wrong.raw and not wrong.samples
    assert broken.problem.startswith("invalid JSON at column 2") and not broken.raw and broken.title == f"{path} line 3"
    assert "</script><img src=x onerror=alert(1)>" in Page(page.page(seen)).text["pre"][0]
    unknown = {"messages": [{"role": "tool", "content": "21 degrees"}, {"role": "assistant", "content": "warm"}]}
    (view,) = see(tokenizer, write([unknown]), row=1).rows
    assert "role 'tool'" in view.problem and "[tool]\n21 degrees" in view.raw


def test_the_first_row_is_the_first_that_is_used(tokenizer, write):
    rows = [{"messages": []}, LONG, chat("q", "a"), chat("r", "b")]
    seen = see(tokenizer, write(rows), max_length=20)
    assert [v.row for v in seen.rows] == [2]
    assert len(seen.notes) == 1 and re.match(
        r"2 rows before it are not used; .* line 1: messages is \[\]", seen.notes[0]
    )
    seen = see(tokenizer, write(rows), max_length=20, samples=5)
    assert [v.row for v in seen.rows] == [2, 3] and seen.notes[1].endswith("has only 2 rows from there on")
    with pytest.raises(DataError, match=r"uses no row of .*; the first, .* line 1: messages is \[\].*--row 1 shows it"):
        see(tokenizer, write(rows[:2], "bad.jsonl"), max_length=20, format="messages")


def test_a_row_beyond_the_limit_says_so(tokenizer, write):
    path = write([chat("q", "a"), chat("r", "b")])
    (view,) = see(tokenizer, [{"path": path, "limit": 1}], row=2).rows
    assert view.notes == ("the source has limit: 1, which leaves this row out",)


def test_sources_and_splits_are_named(tokenizer, write):
    first, second = write([chat("q", "a")]), write([chat("r", "b")], "second.jsonl")
    sources = [first, {"path": second, "weight": 0.5}]
    seen = see(tokenizer, sources, source=2, eval=0.1)
    assert seen.rows[0].title == f"{second} line 1" and seen.rows[0].facts[0] == ("source", "2 of 2 in data.train")
    assert len(seen.notes) == 2 and "weight: 0.5" in seen.notes[0] and "data.eval: 0.1" in seen.notes[1]
    assert see(tokenizer, first, eval=second, split="eval").rows[0].title == f"{second} line 1"
    with pytest.raises(RecipeError, match=r"--source 3: data.train has 2 of them: 1 .*data.jsonl, 2 .*second.jsonl"):
        see(tokenizer, sources, source=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": 9}, "--row 9: there is no such row; the last one is .*data.jsonl line 3"),
        ({"row": 2}, "--row 2: .*data.jsonl line 2 is blank; give another"),
        ({"split": "eval"}, "--split eval: the recipe has no data.eval; add it, or leave out --split"),
        ({"split": "eval", "eval": 0.1}, "--split eval: data.eval: 0.1 holds out rows of data.train"),
        ({"split": "test"}, "--split test: a recipe has the splits train and eval"),
    ],
)
def test_a_wrong_question_is_one_sentence(tokenizer, write, arguments, message):
    path = write([chat("q", "a")])
    with open(path, "a") as file:
        file.write('\n{"messages": []}\n')
    with pytest.raises((DataError, RecipeError), match=message):
        see(tokenizer, path, **arguments)


# -- HTML --------------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_token_in_order_with_its_class(tokenizer, write):
    row = chat("Hi 語", {"content": "yes\nno", "weight": 2}, "q", {"content": "b"})
    seen = see(tokenizer, write([row]))
    parsed = Page(page.page(seen))
    cells = seen.rows[0].samples[0].sections[0].cells
    assert parsed.ids_of_tokens() == [i for c in cells for i in c.ids]
    assert [text for text, *_ in parsed.tokens] == ["".join(s for s, _ in visible(c.text)) for c in cells]
    assert "".join(parsed.where("trained")) == "yes↵\nnob"
    assert parsed.where("control", "trained") == ["<|eot_id|>"] * 2
    assert parsed.where("control")[0] == "<|begin_of_text|>" and len(parsed.where("control")) == 11
    assert parsed.text["sup"] == ["×2"]
    titles = {text: title for text, _, title in parsed.tokens}
    assert re.fullmatch(r"ids \d+, \d+, \d+, position \d+, not trained", titles["語"])
    assert titles["<|begin_of_text|>"] == "id 384, position 0, not trained, control token"
    assert titles["y"].endswith("trained, weight 2") and titles["b"].endswith("trained")
    assert parsed.facts["control"] == "13" and parsed.facts["weights"] == "1, 2"
    assert parsed.facts["tokens"] == f"{sum(len(c.ids) for c in cells)} of at most 2,048"


def test_the_page_has_a_legend_for_all_it_uses_and_both_schemes(tokenizer, write):
    seen = see(tokenizer, write([LONG]), max_length=20, overlong="truncate")
    text = page.page(seen)
    parsed = Page(text)
    assert {c for _, c, _ in parsed.tokens} - {frozenset({"t", "control", "cut"})} <= set(parsed.legend)
    assert {"trained", "control", "cut", "mark", "weight"} <= set().union(*parsed.legend)
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text


def test_the_page_needs_and_runs_nothing_and_keeps_hostile_text_as_text(tokenizer, write):
    seen = see(tokenizer, write([chat(HOSTILE, HOSTILE, **{"<b onload=x>": 1})], "a<img src=x>'\".jsonl"))
    text = page.page(seen)
    parsed = Page(text)
    assert set(parsed.tags) <= set(
        "html head meta title style body main h1 h2 h3 a ul li span i section div dl dt dd nav p sup small pre".split()
    )
    assert parsed.links == ["#row-1"]
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert "default-src 'none'" in text
    (said,) = {"".join(c.text for c in s.cells) for s in seen.rows[0].samples[0].sections}
    assert HOSTILE.strip() in said
    shown = "".join(t for t, *_ in parsed.tokens)
    assert shown.count("</script><img src=x onerror=alert(1)> <|eot_id|> ⟨U+001B⟩[31mred⟨U+0007⟩ ⟨U+202E⟩") == 2
    assert parsed.where("control", "trained") == ["<|eot_id|>"] and parsed.where("control").count("<|eot_id|>") == 1
    assert parsed.facts["not read"] == "<b onload=x>"
    assert any("control tokens" in note for note in parsed.text["li"])


def test_pairs_lie_side_by_side_and_rows_have_anchors(tokenizer, write):
    pair = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    parsed = Page(page.page(see(tokenizer, write([pair, pair]), samples=2)))
    assert parsed.ids == ["row-1", "row-2"]
    assert parsed.links == ["#row-1", "#row-2", "#row-1", "#row-2"]  # of the list, then of each heading
    assert [h.split(" ")[0] for h in parsed.text["h3"]] == ["prompt", "chosen", "rejected"] * 2
    assert page.page(see(tokenizer, write([pair]))).count('<div class="branches">') == 1


def test_a_page_that_is_there_is_not_replaced(tokenizer, write, tmp_path):
    seen = see(tokenizer, write([chat("q", "a")]))
    page.write(seen, tmp_path / "new" / "a.html")
    before = (tmp_path / "new" / "a.html").read_text()
    assert before == page.page(seen)
    with pytest.raises(RunDirError, match="exists; give another --html, or move it away"):
        page.write(seen, tmp_path / "new" / "a.html")
    with pytest.raises(RunDirError, match="--html: the folder of '.*' cannot be made: File exists"):
        page.write(seen, tmp_path / "new" / "a.html" / "b.html")


# -- command line ------------------------------------------------------------------------------------------------------


def tuner(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tuner", "data", "show", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, timeout=120)


def test_the_command_shows_a_row_and_writes_a_page(recipe_file, chats_file, tmp_path):
    done = tuner(str(recipe_file), "--row", "4", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert f"\n{chats_file.name} line 4\n" in done.stdout.decode() and b"\x1b" not in done.stdout
    done = tuner(str(recipe_file), "data.max_length=12", "--row", "1", "--html", "x.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"wrote x.html\n"), done.stderr
    assert Page((tmp_path / "x.html").read_text(encoding="utf-8")).text["p"][0].startswith("Not used: ")


def test_the_command_works_in_a_terminal_without_utf8_and_colours_on_demand(recipe_file, tmp_path):
    done = tuner(str(recipe_file), "--color", cwd=tmp_path, PYTHONIOENCODING="ascii", TERM="dumb", NO_COLOR="1")
    assert done.returncode == 0 and b"\\u21b5" in done.stdout and b"\x1b[" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "99"], "--row 99: there is no such row; the last one is chats.jsonl line 22"),
        (["--html", "chats.jsonl"], "'chats.jsonl' exists; give another --html, or move it away"),
        (["--html", "x.html", "--color"], "--color and --no-color have no effect with --html"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(recipe_file, tmp_path, arguments, message):
    done = tuner(str(recipe_file), *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode().startswith(f"error: {message}") and done.stderr.count(b"\n") == 1
