"""Definitions of words from WordNet's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pages import clean
from sources import WORDNET, unpack

POS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


class Word(NamedTuple):
    """`common`: how often the word's first sense is tagged in WordNet's own texts."""

    word: str
    common: int
    pos: str
    gloss: str
    examples: list[str]


def words(debs: Path) -> list[Word]:
    """Every single word with its commonest sense, in the order of the files."""
    base = unpack(WORDNET, debs) / "usr/share/wordnet"
    glosses: dict[tuple[str, str], str] = {}
    best: dict[str, tuple[int, str, str]] = {}
    for pos in POS:
        for line in _lines(base / f"data.{pos}"):
            head, gloss = line.split(" | ", 1)
            glosses[pos, head.split()[0]] = gloss.strip()
        for line in _lines(base / f"index.{pos}"):
            fields = line.split()
            pointers = int(fields[3])
            word, tagged, offset = fields[0], int(fields[5 + pointers]), fields[6 + pointers]
            plain = word.isalpha() and word.isascii() and len(word) >= 3
            if plain and (word not in best or tagged > best[word][0]):
                best[word] = (tagged, pos, offset)
    out = []
    for word, (tagged, pos, offset) in best.items():
        gloss, *examples = (p.strip() for p in re.split(r";\s*(?=\")", glosses[pos, offset]))
        out.append(Word(word, tagged, pos, clean(gloss), [clean(e.strip('"; ')) for e in examples]))
    return out


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith(" ")]
