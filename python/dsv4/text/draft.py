"""A prompt on its way from text to token ids.

What was encoded before is looked up; the rest is encoded in batches, so that whoever encodes can put others between
them, stop after any of them, and run several at once. Of a prompt that turns out too long no more is encoded than fits.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv4.errors import RequestError
from dsv4.text.id_store import IdStore

BATCH = 65536
"""Characters of a batch; some twenty milliseconds of work."""

_TEXTS = 1024
"""Texts of a batch at most: what is done for each of them holds the interpreter's lock."""

LONGEST_RUN = 8 * 2**20
"""Characters of one piece at most. No text has so many without the end of a word, and the encoder takes some 100 bytes
for each of them."""

Encode = Callable[[Sequence[str]], "list[list[int]]"]
"""Ids of texts, each encoded alone. It gives the interpreter's lock up."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How many tokens a prompt may have."""

    tokens: int
    param: str
    """The field that an error names."""
    holder: str = "the context holds"

    def refuse(self, has: str) -> RequestError:
        """The error for a prompt that has more."""
        text = f"the prompt has {has}, but {self.holder} {self.tokens} tokens"
        return RequestError(text, self.param, "context_length_exceeded", 400)


@dataclass(slots=True)
class Batch:
    """Texts to encode and their places in the prompt."""

    encode: Encode
    store: IdStore
    salt: str
    places: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    size: int = 0
    """Characters. Far more than `BATCH` where a text has no place to cut."""

    def add(self, place: int, text: str) -> None:
        self.places.append(place)
        self.texts.append(text)
        self.size += len(text)

    def run(self) -> Batch:
        """Encodes the texts and stores what they gave. The slow part, for any thread."""
        self.ids = [array("i", ids).tobytes() for ids in self.encode(self.texts)]
        for text, ids in zip(self.texts, self.ids, strict=True):
            self.store.put(self.salt, text, ids)
        return self


class Draft:
    """For one thread; only batches run elsewhere."""

    def __init__(
        self, pieces: Iterable[str | bytes], batch: Callable[[], Batch], bound: Bound | None = None
    ) -> None:
        """`pieces` in order: texts, or ids as int32. `batch` makes an empty one. Raises RequestError as soon as there are
        more tokens than `bound`, here and in what follows."""
        self._new_batch, self._bound = batch, bound
        self._parts: list[bytes] = []
        self._missing: list[tuple[int, str]] = []
        self._held = 0
        known = batch()
        for place, piece in enumerate(pieces):
            ids = piece if isinstance(piece, bytes) else known.store.get(known.salt, piece)
            self._parts.append(b"")
            if ids is None:
                self._missing.append((place, str(piece)))
            else:
                self._fill(place, ids)

    def batches(self) -> Iterator[Batch]:
        """What is left to encode; each batch is to be run and given to `take`."""
        batch = self._new_batch()
        for place, text in self._missing:
            if len(text) > LONGEST_RUN:
                raise RequestError(
                    f"the prompt has {len(text)} characters without the end of a word; it takes at most {LONGEST_RUN}",
                    self._bound.param if self._bound else None,
                )
            if batch.texts and (batch.size + len(text) > BATCH or len(batch.texts) == _TEXTS):
                yield batch
                batch = self._new_batch()
            batch.add(place, text)
        if batch.texts:
            yield batch

    def take(self, batch: Batch) -> None:
        """Puts the ids of a batch in their places."""
        for place, ids in zip(batch.places, batch.ids, strict=True):
            self._fill(place, ids)

    def finish(self) -> np.ndarray:
        """Encodes what is left, here and now, and gives the ids."""
        for batch in self.batches():
            self.take(batch.run())
        return self.ids()

    def ids(self) -> np.ndarray:
        """All of them, int32 [tokens], contiguous and not writable."""
        return np.frombuffer(b"".join(self._parts), np.int32)

    def _fill(self, place: int, ids: bytes) -> None:
        self._parts[place] = ids
        self._held += len(ids) // 4
        if self._bound is not None and self._held > self._bound.tokens:
            raise self._bound.refuse(f"more than {self._bound.tokens} tokens")
