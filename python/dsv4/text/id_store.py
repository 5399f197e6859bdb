"""Ids of texts that were encoded before, so that the next turn of a conversation costs its new text only."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict

CAPACITY = 256 * 2**20
"""Bytes. Texts and ids of a million tokens of English take some 9 MB."""

_OVERHEAD = 200
"""Bytes of an entry beside its text and ids: key, link and table."""


class IdStore:
    """Exact texts to their ids, bounded in bytes; the least recently used go first. Thread-safe.

    A text is looked up by its hash and compared as a whole. Entries are kept apart by `salt`, as the prefix cache keeps
    its own: how long encoding takes would else tell one tenant which texts another has sent.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        """`capacity`: bytes of texts, ids and bookkeeping."""
        self.capacity, self.bytes = capacity, 0
        self._entries: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, salt: str, text: str) -> bytes | None:
        """The ids of a text as int32 in the machine's byte order, or None."""
        key = (salt, text)
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, salt: str, text: str, ids: bytes) -> None:
        """Keeps the ids of a text in place of what it had. What is larger than the store is not kept."""
        size = _size(text, ids)
        with self._lock:
            before = self._entries.pop((salt, text), None)
            if before is not None:
                self.bytes -= _size(text, before)
            if size > self.capacity:
                return
            self._entries[salt, text] = ids
            self.bytes += size
            while self.bytes > self.capacity:
                (_, old), gone = self._entries.popitem(last=False)
                self.bytes -= _size(old, gone)


def _size(text: str, ids: bytes) -> int:
    return sys.getsizeof(text) + len(ids) + _OVERHEAD
