"""Ids to text one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Turns tokens into text as they come, in constant time each. A character whose bytes are not complete is held back,
    so the pieces joined are the decoded whole."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes, self._hidden = token_bytes, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        return "" if token in self._hidden else self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is still held back, as U+FFFD, at the end."""
        return self._decoder.decode(b"", final=True)
