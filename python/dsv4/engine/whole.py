"""Ctrl-C waits for the end of what must not be left half-way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What Ctrl-C does happens at the end of this. A second one is not held back, for what never ends. Off the main thread, which
    alone gets signals, and where Ctrl-C does nothing of Python's, this is nothing."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    frames: list[FrameType | None] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        frames.append(frame)
        if len(frames) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(frames) == 1:
            before(signal.SIGINT, frames[0])
