"""One HTTP/1.1 connection: uvicorn's protocol with what it lacks. Limits on headers and on slow readers, refusals that
arrive, and its place among all connections.

    header  must be complete within `header_timeout`, and small
    answer  what is written must be taken within `write_timeout`, or 64 KiB of it
    end     with something unread the sending side is closed first and the rest is dropped: to close at once would
            reset the connection, and the client would lose the answer that it was just given
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsv4.api.connections import Connections
from dsv4.api.errors import error_body
from dsv4.api.metrics import Metrics
from dsv4.api.request_log import Record, new_request_id
from dsv4.errors import RequestError

log = logging.getLogger("dsv4.api")

MAX_HEADER_BYTES = 32 * 1024
"""Request line and headers together."""

OVER_TIMEOUT = 2.0
"""Seconds in which the header must arrive on a connection over the limit, as others wait for its place."""

LINGER = 10.0
"""Seconds for which what a refused client still sends is read and dropped."""

MIN_TAKEN = 64 * 1024
"""Bytes of an answer that a client must take within `write_timeout`, if there are so many."""


class Outbox:
    """The transport as the protocol writes to it. Watches that what is written is taken, and closes gently."""

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        self._transport, self._protocol = transport, protocol
        self._written = self._due = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)
        if self._timer is None:
            self._watch()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Closes once everything written is sent."""
        if self._closing:
            return
        self._closing = True
        if self._protocol.has_unread and not self._transport.is_closing():
            self._protocol.linger()
        else:
            self._transport.close()

    def lost(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        taken = self._written - self._transport.get_write_buffer_size()
        self._due = min(self._written, taken + MIN_TAKEN)
        self._timer = self._protocol.loop.call_later(self._protocol.write_timeout, self._check)

    def _check(self) -> None:
        self._timer = None
        waiting = self._transport.get_write_buffer_size()
        if not waiting:
            return  # the next write starts the watch again
        if self._written - waiting >= self._due:
            self._watch()
            return
        self._protocol.abort(f"took too little of its answer for {self._protocol.write_timeout:g} s")


class GuardedProtocol(HttpToolsProtocol):
    """The clock of a header runs from the connection's start, or from a later request's first byte, to its end."""

    all_connections: Connections
    metrics: Metrics
    header_timeout = 10.0
    write_timeout = 60.0

    def __init__(self, over: bool, **settings: Any) -> None:
        """`over`: the connection is one more than the server serves."""
        super().__init__(**settings)
        self.over = over

    @property
    def peer(self) -> str:
        """The client as logs name it."""
        return f"{self.client[0]}:{self.client[1]}" if self.client else "unix"

    @property
    def has_unread(self) -> bool:
        """Whether the client may still be sending a request that is answered."""
        if self._in_header or self._refused:
            return self._header_bytes > 0 or self._refused
        return self.cycle is not None and self.cycle.more_body

    @property
    def write_paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outbox = Outbox(transport, self)
        super().connection_made(self._outbox)  # type: ignore[arg-type]
        self._header_bytes = 0
        self._in_header, self._lingers, self._refused, self._begun = True, False, False, False
        self._arrived = time.monotonic()
        self._patience = min(self.header_timeout, OVER_TIMEOUT) if self.over else self.header_timeout
        self._deadline = self.loop.call_later(self._patience, self._header_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        if self._in_header and self._header_bytes and not self._refused:
            self._account(new_request_id(), 0, "client_gone")
        self._outbox.lost()
        self.all_connections.idle.pop(self, None)
        # The descriptor is closed at the end of this turn of the loop, and may be taken after it.
        self.loop.call_soon(self.all_connections.leave, self.over)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection for the answer. A client that says that it sends no more cannot be told from one that has
        closed, so what the engine does for it ends; a GET costs nothing, and is answered."""
        cycle = self.cycle  # the last one that has come: where others wait before it, they may cost something
        if self.pipeline or cycle is None or cycle.response_complete or cycle.scope["method"] != "GET":
            return False
        cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        if self._lingers:
            return
        self.all_connections.idle.pop(self, None)
        # Checked before the parser sees the data, which may end a header and hold most of a body: so at most
        # one read (64 KiB) is let through beyond the limit.
        if self._in_header:
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"the header has more than {MAX_HEADER_BYTES} bytes", "header_too_large")
                return
            self._header_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header, self._header_size, self._begun = True, 0, True
        self._arrived = time.monotonic()
        self._deadline.cancel()
        self._deadline = self.loop.call_later(self._patience, self._header_late)

    def on_url(self, url: bytes) -> None:
        self._header_size += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_size += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._deadline.cancel()
        self._in_header, self._header_bytes = False, 0
        if self._header_size > MAX_HEADER_BYTES:
            self._refuse(
                431,
                f"the header has {self._header_size} bytes; the limit is {MAX_HEADER_BYTES}",
                "header_too_large",
            )
            return
        if self.over and self.all_connections.promote():
            self.over, self._patience = False, self.header_timeout
        self.scope["dsv4_connection"] = self  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        if self.over:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:  # uvicorn reads on after every answer, however many requests wait
            self.flow.pause_reading()
        if not self.pipeline and not self._in_header and not self.transport.is_closing():
            self.all_connections.idle[self] = None

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def abort(self, why: str) -> None:
        """Closes at once, whatever is still to be sent."""
        log.info("%s %s: closed", self.peer, why)
        self._outbox._transport.abort()

    def give_way(self) -> None:
        """Closes an idle connection, as another one needs its place."""
        self.all_connections.idle.pop(self, None)
        self.transport.close()

    def linger(self) -> None:
        """Closes the sending side, and the rest when the client has closed its own, or after a while."""
        self._lingers = True
        self._deadline.cancel()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        transport = self._outbox._transport
        transport.write_eof()
        self._deadline = self.loop.call_later(OVER_TIMEOUT if self.over else LINGER, transport.close)

    def _header_late(self) -> None:
        if self._header_bytes:
            self._refuse(408, f"the header was not complete after {self._patience:g} s", "header_timeout")
        elif not self.transport.is_closing():
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Upgrades are passed over, as RFC 9110 allows; uvicorn would tell operators to install what is of no use here."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP/1.1 request", "invalid_http")

    def _refuse(self, status: int, text: str, code: str) -> None:
        """Answers outside the application and closes."""
        if self.transport.is_closing():
            return
        self._refused = True
        body = orjson.dumps(error_body(RequestError(text, None, code, status)))
        request_id = new_request_id()
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._account(request_id, status, code)

    def _account(self, request_id: str, status: int, reason: str) -> None:
        """A request has ended that never reached the application."""
        method, url = "-", self.url if self._begun else b""
        if url:
            method = self.parser.get_method().decode("latin-1")
        path = url.partition(b"?")[0].decode("latin-1") or "-"
        record = Record(request_id, method, path, self.peer, arrived=self._arrived)
        record.status, record.reason = status, reason
        record.end(self.metrics)
