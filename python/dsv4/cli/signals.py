"""Signals while a command starts, when there is nothing yet to end in order."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def ends_at_signal(doing: str, clean_up: Callable[[], None] = lambda: None) -> Iterator[Callable[[], object]]:
    """Within it SIGINT and SIGTERM end the process at once, with one line ("… while `doing`") and exit code 128 + n.

    A handler is needed, as the kernel keeps signals without one from process 1, which a container's command is. It is
    a thread that acts, as the main thread may be far away in foreign code (reading weights). The handlers stay after
    the end of the block, until others take their place, so that there is no gap. What it gives makes them do nothing, for when
    others are there that call these, too.
    """

    def end(number: int, frame: FrameType | None = None) -> None:
        if not ending.acquire(blocking=False):
            return
        clean_up()
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K\x1b[?25h")  # the bar goes, the cursor comes back
        print(f"dsv4: ended by {signal.Signals(number).name} while {doing}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def watch() -> None:
        while number := ours.recv(1):
            if number[0] in SIGNALS:
                end(number[0])

    ending = threading.Lock()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, end)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="dsv4-signals", daemon=True).start()
    try:
        yield lambda: ending.acquire(blocking=False)
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # which ends the thread
