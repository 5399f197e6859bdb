"""Answers before there is a server: while the model loads, every request gets 503 with `Retry-After`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from types import TracebackType

import orjson

from dsv4.api.errors import RETRY_AFTER, error_body
from dsv4.api.request_log import Record, new_request_id
from dsv4.errors import RequestError

TICK = 0.5
"""Seconds between two looks at the sockets. Clients that ask again at once are slowed down by it."""

MOST = 256
"""Connections that one look takes."""

TEXT = "the model is loading"


class Loading(threading.Thread):
    """`with Loading(sockets): …`. What comes just before the end of the block waits in the kernel for the server."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        super().__init__(name="dsv4-loading", daemon=True)
        self._sockets = sockets
        self._done = threading.Event()

    def __enter__(self) -> Loading:
        for sock in self._sockets:
            sock.setblocking(False)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        answered: list[socket.socket] = []
        while not self._done.wait(TICK):
            _close(answered)
            answered = [conn for sock in self._sockets for conn in _accepted(sock)]
            for conn in answered:
                with contextlib.suppress(OSError):  # it went away
                    _answer(conn)
        _close(answered)


def _accepted(sock: socket.socket) -> list[socket.socket]:
    found: list[socket.socket] = []
    with contextlib.suppress(OSError):  # none is left, or no descriptor is
        while len(found) < MOST:
            found.append(sock.accept()[0])
    return found


def _answer(conn: socket.socket) -> None:
    conn.setblocking(False)
    try:
        request = conn.recv(65536)
    except BlockingIOError:
        request = b""
    record = _record_of(request, conn)
    if record.path == "/health":
        body = orjson.dumps({"status": TEXT})
    else:
        body = orjson.dumps(error_body(RequestError(TEXT, None, "loading", 503)))
    conn.sendall(
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"retry-after: %b\r\ncontent-length: %d\r\n\r\n%b" % (RETRY_AFTER[503], len(body), body)
    )
    conn.shutdown(socket.SHUT_WR)
    record.status, record.reason = 503, "loading"
    record.end(None)


def _record_of(request: bytes, conn: socket.socket) -> Record:
    words = request[:4096].partition(b"\r")[0].decode("latin-1").split(" ")
    method, url = words[:2] if len(words) == 3 else ("-", "-")
    peer = conn.getpeername() if conn.family != socket.AF_UNIX else None
    return Record(new_request_id(), method, url.partition("?")[0], f"{peer[0]}:{peer[1]}" if peer else "unix")


def _close(answered: list[socket.socket]) -> None:
    """A look later: to close with something unread would reset the connection, and the answer might be lost."""
    for conn in answered:
        with contextlib.suppress(OSError):
            for _ in range(MOST):
                if not conn.recv(65536):
                    break
        conn.close()
