"""Two processes and a socket between them: messages in order, and the end of the other side.

A message is eight bytes (length of the body, length of the payload), the body, and the payload as it lies in memory. Sending
never waits: what the socket does not take at once is sent by a thread.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque

import numpy as np

_HEAD = struct.Struct("<II")
_READ = 2**18
"""Bytes that are read at once."""
_NOTHING = np.empty(0, np.int32)


class Link:
    """One end of a socket pair. Any thread may send, one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=_READ)
        self._left: deque[memoryview] = deque()
        """What waits to be sent, in order."""
        self._lock = threading.Condition()
        self._writer: threading.Thread | None = None
        self._closed = False

    def send(self, body: bytes, payload: np.ndarray = _NOTHING) -> None:
        """Sends a message. `payload`: int32, contiguous, not to be written any more. What is sent to a side that is gone is
        lost: `receive` tells of its end."""
        # An empty array has no bytes to be cast to.
        data = memoryview(payload).cast("B") if payload.size else memoryview(b"")
        parts = [memoryview(_HEAD.pack(len(body), data.nbytes) + body), data]
        with self._lock:
            if self._closed:
                return
            if not self._left:
                parts = self._sent(parts)
            if any(part.nbytes for part in parts):
                self._left.extend(part for part in parts if part.nbytes)
                self._begin_writing()

    def _sent(self, parts: list[memoryview]) -> list[memoryview]:
        """Sends what the socket takes at once; what is left."""
        try:
            count = self._sock.sendmsg(parts, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return parts
        except OSError:
            self._closed = True
            return []
        left = []
        for part in parts:
            left.append(part[count:])
            count = max(0, count - part.nbytes)
        return left

    def _begin_writing(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="dsv4-link", daemon=True)
            self._writer.start()
        self._lock.notify_all()

    def _write(self) -> None:
        """The thread that sends what a socket did not take at once."""
        while True:
            with self._lock:
                while not self._left and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                part = self._left[0]  # it stays there while it is sent, so that nothing overtakes it
            try:
                self._sock.sendall(part)
            except OSError:
                self.close()
                return
            with self._lock:
                if self._left:
                    self._left.popleft()
                self._lock.notify_all()

    def receive(self) -> tuple[bytes, np.ndarray] | None:
        """The next message and its payload, int32 (a copy of its own). Waits for it; None when the other side is gone."""
        try:
            head = self._file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            length, size = _HEAD.unpack(head)
            body = self._file.read(length)
            payload = np.empty(size // 4, np.int32) if size else _NOTHING
            if len(body) < length or (size and self._fill(memoryview(payload).cast("B")) < size):
                return None
        except (OSError, ValueError):  # it was closed here
            return None
        return body, payload

    def _fill(self, room: memoryview) -> int:
        """Reads until `room` is full; how far it came."""
        done = 0
        while done < room.nbytes:
            count = self._file.readinto(room[done:])
            if not count:
                break
            done += count
        return done

    def flush(self, seconds: float) -> None:
        """Waits until all is sent, but not longer than that."""
        with self._lock:
            self._lock.wait_for(lambda: not self._left or self._closed, seconds)

    def close(self) -> None:
        """Ends both directions; `receive` gives None, here and there. What was not sent is lost."""
        with self._lock:
            self._closed = True
            self._left.clear()
            self._lock.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Gives the descriptor back, once nobody receives any more."""
        self.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._sock.close()
