"""Standard streams that cannot end a process: a closed one is opened on /dev/null, and what cannot be written to
standard error is dropped."""

from __future__ import annotations

import contextlib
import io
import os
import sys


class SafeStream(io.TextIOWrapper):
    """Text on a descriptor. A full disk, a pipe without a reader: the text is lost, and nothing else happens."""

    def __init__(self, fd: int) -> None:
        raw = os.fdopen(fd, "wb", buffering=0, closefd=False)
        super().__init__(raw, errors="backslashreplace", write_through=True)  # type: ignore[type-var]

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def secure() -> None:
    """Called before anything else opens a file: a socket on descriptor 2 would get the warnings of C libraries."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # not one that a caller has put in its place
        sys.stderr = SafeStream(2)
