"""How far a start is."""

from __future__ import annotations

import logging
import time
from typing import Protocol

log = logging.getLogger("dsv4.engine")

TELL_EVERY = 2.0
"""Seconds between two lines of the log."""


class Progress(Protocol):
    """Called while a part of the start goes on: how much of it is done and how much there is, a name, and of what: `weights` (bytes, the
    tensor just read), `kernels` or `graphs` (pieces)."""

    def __call__(self, done: int, total: int, name: str, stage: str = "weights") -> None: ...


class LogProgress:
    """Lines of the log, for a start that nobody shows."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int, name: str, stage: str = "weights") -> None:
        if time.monotonic() - self._told > TELL_EVERY or done == total:
            self._told = time.monotonic()
            log.info("%s %d/%d", stage, done, total)
