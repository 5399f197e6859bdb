"""Texts that look like markup: tokens that would complete one are barred, letter by letter, where an answer is read as a chat's.

A grammar cannot say that a string inside of JSON is anything but some text, and what reads the answer takes the letters for the token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

import numpy as np

MARKS = tuple(mark.encode() for mark in ("｜DSML｜", "<think>", "</think>"))


class Bars:
    """Of one vocabulary."""

    def __init__(self, tokens: Sequence[bytes], special: Collection[int]) -> None:
        """`tokens`: the bytes of each; `special`: those that are no text."""
        self._tokens, self._special = tokens, frozenset(special)
        letters = sorted(
            (text, token) for token, text in enumerate(tokens) if text and token not in self._special
        )
        whole = [token for text, token in letters if any(mark in text for mark in MARKS)]
        self._whole = self._bits(whole)
        """Tokens that hold a mark. int32 [ceil(V / 32)], a bit for each that is not barred."""
        self._rest: dict[bytes, np.ndarray] = {}
        """By what of a mark stands before: tokens that begin with the rest of it."""
        for begun, rest in ((mark[:k], mark[k:]) for mark in MARKS for k in range(1, len(mark))):
            first, last = bisect_left(letters, (rest, -1)), bisect_left(letters, (rest + b"\xff", -1))
            if first < last:
                self._rest[begun] = self._bits(token for _, token in letters[first:last])
        self._longest = max(map(len, MARKS)) - 1

    def _bits(self, tokens: Iterable[int]) -> np.ndarray:
        allowed = np.ones(-(-len(self._tokens) // 32) * 32, np.uint8)
        allowed[list(tokens)] = 0
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def follow(self, tail: bytes, new: Iterable[int]) -> bytes:
        """The last letters of an answer, once it has got `new` tokens."""
        for token in new:
            tail = (
                b""
                if token in self._special or token >= len(self._tokens)
                else (tail + self._tokens[token])[-self._longest :]
            )
        return tail

    def apply(self, bits: np.ndarray, tail: bytes) -> None:
        """Bars tokens in int32 [ceil(V / 32)], unless nothing else may come."""
        left = bits & self._whole
        for begun, allowed in self._rest.items():
            if tail.endswith(begun):
                left &= allowed
        if left.any():
            bits[:] = left
