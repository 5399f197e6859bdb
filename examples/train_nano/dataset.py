"""The built data in memory: texts and conversations as one array of token ids each."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK = range(7)
"""Ids of the markers, in the order of build_data.SPECIAL."""

FIRST_WORD = 32 + 256
"""Ids below are markers and single bytes."""


@dataclass(slots=True)
class Dataset:
    """`text` uint16: BOS document EOS ...; `stale` bool: the token ends eight that have stood within the 200 before;
    `chats` uint16 with the start of each conversation in `chat_starts`
    (and its end, one more entry) and in `spoken` bool what the assistant writes: thoughts and end included, the
    marker that opens its turn not."""

    tokenizer: Tokenizer
    text: np.ndarray
    chats: np.ndarray
    chat_starts: np.ndarray
    nouns: list[str]
    valid: np.ndarray
    valid_bytes: int
    checks: dict[str, Any]
    spoken: np.ndarray = field(init=False)
    stale: np.ndarray = field(init=False)
    _known: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.stale = repeats(self.text)
        at = np.arange(len(self.chats))
        last = {t: np.maximum.accumulate(np.where(self.chats == t, at, -1)) for t in (ASSISTANT, EOS)}
        before = {t: np.concatenate([[-1], a[:-1]]) for t, a in last.items()}
        words = [f"{mark}{noun}" for noun in self.nouns for mark in " -"]
        self._known = dict(zip(words, _encode(self.tokenizer, words), strict=True))
        self.spoken = (before[ASSISTANT] > before[EOS]) & (before[ASSISTANT] != at - 1)

    @classmethod
    def load(cls, folder: Path, texts: int | None = None) -> Dataset:
        """Unpacks and tokenizes (the first `texts` texts and conversations only, where given): seconds on many cores,
        minutes on two."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        valid = (folder / "valid.txt").read_text()
        documents = _encode(tokenizer, _pieces(folder / "text.xz")[:texts])
        chats = _encode(tokenizer, _pieces(folder / "chats.xz")[:texts])
        return cls(
            tokenizer,
            text=np.concatenate([np.array([BOS, *ids, EOS], np.uint16) for ids in documents]),
            chats=np.concatenate([np.array(ids, np.uint16) for ids in chats]),
            chat_starts=np.concatenate([[0], np.cumsum([len(ids) for ids in chats])]),
            nouns=json.loads((folder / "words.json").read_text()),
            valid=np.array(tokenizer.encode(valid, add_special_tokens=False).ids, np.uint16),
            valid_bytes=len(valid.encode()),
            checks=json.loads((folder / "checks.json").read_text()),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; markers in it are markers."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_words(self, text: str) -> list[int]:
        """The same for plain sentences, quicker: the tokenizer never joins across the places where this cuts."""
        ids: list[int] = []
        for piece in _CUTS.split(text):
            known = self._known.get(piece)
            if known is None:
                known = self._known[piece] = self.encode(piece)
            ids += known
        return ids


def repeats(ids: np.ndarray, width: int = 8, within: int = 200) -> np.ndarray:
    """bool [N]: this token ends `width` tokens that also end at one of the `within` places before."""
    hashes = np.zeros(len(ids), np.uint64)
    for back in range(width):
        hashes[back:] += _mixed(ids[: len(ids) - back], back)
    hashes[: width - 1] = np.arange(min(width - 1, len(ids)))
    order = np.argsort(hashes, kind="stable")
    same = (hashes[order[1:]] == hashes[order[:-1]]) & (order[1:] - order[:-1] <= within)
    stale = np.zeros(len(ids), bool)
    stale[order[1:][same]] = True
    return stale


def _mixed(ids: np.ndarray, salt: int) -> np.ndarray:
    """A 64-bit hash of each id, another for each `salt` (splitmix64)."""
    x = ids.astype(np.uint64) + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_CUTS = re.compile(r"(?=[ -][A-Za-z0-9])|(?=[.?])|(?<=\n)(?=[A-Z])")


def _pieces(path: Path) -> list[str]:
    return lzma.decompress(path.read_bytes()).decode().split("\0")


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    out: list[list[int]] = []
    for i in range(0, len(texts), 2000):
        batch = tokenizer.encode_batch(list(texts[i : i + 2000]), add_special_tokens=False)
        out += [e.ids for e in batch]
    return out
