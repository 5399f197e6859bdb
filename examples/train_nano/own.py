"""What the model itself writes when it loops, as rows to unlearn.

Sequence-level unlikelihood (Welleck et al., "Neural text generation with unlikelihood training", ICLR 2020, section
5.2): loops made of the text's own lines (rows.text) teach the way out of those, but a model loops in its own ways.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from dataset import BOS, EOS, Dataset, repeats
from measure import Measure
from rows import Row

Batch = tuple[np.ndarray, np.ndarray]

OWN = -4
"""Loss weight against a token of a loop."""

PIECE = 256
"""Tokens of a piece, its opening included."""

WIDTH = 6
"""A token that ends this many tokens that stand before in the piece is one of a loop."""


class OwnText:
    """Pieces written from openings of the training text, and rows made of them."""

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.random = data, random.Random(seed)
        self.pieces: list[Row] = []

    def write(self, measure: Measure, count: int) -> float:
        """New pieces at temperature 0.7; the share of their tokens that loop."""
        text, r = self.data.text, self.random
        prompts = []
        for _ in range(count):
            at = r.randrange(len(text) - 32)
            prompts.append(
                [BOS, *(t for t in text[at : at + r.randint(3, 24)].tolist() if t not in (BOS, EOS))]
            )
        said = measure.write(prompts, PIECE - 25, temperature=0.7)
        self.pieces = []
        for prompt, ids in zip(prompts, said, strict=True):
            ids = ids[: ids.index(EOS) + 1] if EOS in ids else ids
            whole = prompt + ids
            again = repeats(np.array(whole, np.uint16), WIDTH, PIECE)
            again[: len(prompt)] = False
            self.pieces.append((whole, np.where(again, OWN, 0).tolist()))
        return sum(w < 0 for _, ws in self.pieces for w in ws) / sum(map(len, said))

    def mixed(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The stream's batches (ids int32 [B, T + 1], weights int8 [B, T]); once there are pieces, the last row of
        each is made of them."""
        for ids, weights in stream:
            if self.pieces:
                ids[-1], weights[-1] = self._row(ids.shape[1])
            yield ids, weights

    def _row(self, length: int) -> Row:
        ids: list[int] = []
        weights: list[int] = []
        while len(ids) < length:
            piece, against = self.random.choice(self.pieces)
            ids += piece
            weights += against
        return ids[:length], weights[1:length]
