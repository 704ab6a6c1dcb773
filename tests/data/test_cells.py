"""Cells hold every id once, spell the very text, and leave nothing invisible."""

from __future__ import annotations

import random

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tuner.data.render import Renderer
from tuner.data.show.cells import CellReader, clean, visible
from tuner.data.templates import TEMPLATES
from tuner.types import span

WORDS = ["Forty-two", " ", "日本語", "👩‍👩‍👧", "é", "\n\n", "\t", "x = {1}", "<|eot_id|>", "\u200b", "ﷺ", "\x00", "«·»"]


def test_cells_hold_every_id_once_and_spell_the_very_text(tokenizer):
    reader, encode = CellReader(tokenizer), Renderer(tokenizer, TEMPLATES["llama3"])._encoder.document
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        (ids,) = encode([text])
        cells = reader.cells([span(ids, True)])
        assert [i for c in cells for i in c.ids] == ids
        assert "".join(c.text for c in cells) == text
        assert [c.at for c in cells] == np.cumsum([0, *(len(c.ids) for c in cells)])[:-1].tolist()
        assert not any(c.control for c in cells)
        assert all(len(c.ids) == 1 or len(c.ids) > len(c.text.encode()) / 5 for c in cells)


def test_the_tokens_of_one_character_are_one_cell_and_half_of_one_is_bytes(tokenizer):
    reader = CellReader(tokenizer)
    (ids,) = Renderer(tokenizer, None)._encoder.document(["a語b"])
    assert len(ids) == 5  # the golden vocabulary spells 語 in three bytes
    assert [(c.text, len(c.ids)) for c in reader.cells([span(ids, True)])] == [("a", 1), ("語", 3), ("b", 1)]
    cut = [*reader.cells([span(ids[:3], True)]), *reader.cells([span(ids[3:], False)], 3, cut=True)]
    assert [clean(c.text) for c in cut] == ["a", "⟨E8⟩⟨AA⟩", "⟨9E⟩", "b"]
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    mixed = reader.cells([span([*ids[1:3], eot, ids[3], ids[0]], True, 0.5)])
    assert [clean(c.text) for c in mixed] == ["⟨E8⟩⟨AA⟩", "<|eot_id|>", "⟨9E⟩", "a"]
    assert [c.control for c in mixed] == [False, True, False, False] and {c.weight for c in mixed} == {0.5}
    assert [clean(c.text) for c in reader.cells([span([*ids[1:3], ids[0]], True)])] == ["⟨E8⟩⟨AA⟩", "a"]


def test_blanks_and_bytes_of_a_sentencepiece_vocabulary():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "▁Hi": 6, "▁": 7, "there": 8}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    cells = CellReader(tokenizer).cells([span([1, 6, 7, 8, 3, 4, 5, 2], True)])
    assert [c.text for c in cells] == ["<s>", " Hi", " ", "there", "€", "</s>"]
    assert [c.control for c in cells] == [True, False, False, False, False, True]


def test_nothing_invisible_is_left():
    shown = visible("a\tb\nc\x1b[0m\u200b\u00a0\ufe0f\ud800 «", reserved="«")
    assert "".join(s for s, _ in shown) == "a⇥b↵\nc⟨U+001B⟩[0m⟨U+200B⟩⟨U+00A0⟩⟨U+FE0F⟩⟨U+D800⟩ ⟨U+00AB⟩"
    assert [mark for _, mark in shown] == [False, True] * 5
    every = "".join(s for s, _ in visible("".join(map(chr, range(0x110000)))))
    assert all(c.isprintable() or c == "\n" for c in every)
    assert clean("a\nb") == "a↵b"
