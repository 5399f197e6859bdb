"""Runs the application on uvicorn with uvloop: deadlines on headers, draining at SIGTERM, exit code 0.

SIGTERM (or Ctrl-C): health says 503 at once and new requests get 503 with Retry-After, while running ones may
end within `drain_timeout`; what is left then is aborted and gets a proper terminal event. A second Ctrl-C
cuts the wait short; a second SIGTERM does not.

An engine that has died (see `AsyncEngine.died`) ends the server too, and `serve` raises.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsv4.api.app import create_app
from dsv4.api.errors import error_body
from dsv4.api.service import Service
from dsv4.errors import EngineDead, RequestError

log = logging.getLogger("dsv4.api")

MAX_HEADER_BYTES = 32 * 1024
"""Request line and headers together."""

KEEP_ALIVE = 75
"""Seconds an idle connection stays open: longer than usual proxies keep theirs, so that these never meet a
closing one."""

ANSWER_GRACE = 5.0
"""Seconds for sending the terminal events once the engine has drained."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with what it lacks: a limit on the header's size and on the time it may take.

    The clock runs from the connection's start, or from a later request's first byte, to the end of its
    header.
    """

    header_timeout = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_header = True
        self._deadline = self.loop.call_later(self.header_timeout, self._header_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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
        self._in_header, self._header_size = True, 0
        self._deadline.cancel()
        self._deadline = self.loop.call_later(self.header_timeout, self._header_late)

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
        super().on_headers_complete()

    def _header_late(self) -> None:
        if self._header_bytes:
            self._refuse(
                408, f"the header was not complete after {self.header_timeout:g} s", "header_timeout"
            )
        elif not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP/1.1 request", "invalid_http")

    def _refuse(self, status: int, text: str, code: str) -> None:
        """Answers outside the application and closes."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error_body(RequestError(text, None, code, status)))
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with draining in place of closing."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_ready = service, on_ready
        self._asked = 0
        self._drain: asyncio.Task[None] | None = None
        self._hurry: asyncio.Task[bool] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal handler. Only notes the wish; `on_tick` acts on it within 0.1 s."""
        self._asked = max(self._asked, 1) if sig == signal.SIGTERM else self._asked + 1

    def stop(self) -> None:
        """What SIGTERM does, for servers on a thread."""
        self.handle_exit(signal.SIGTERM, None)

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_then_exit())
        if self._asked > 1 and self._hurry is None:
            self._hurry = asyncio.ensure_future(self.service.engine.drain(0))
        if self.service.engine.died is not None and self._drain is None:
            self._drain = asyncio.ensure_future(self._exit_once_answered())
        return await super().on_tick(counter)

    async def _drain_then_exit(self) -> None:
        self.service.draining = True
        timeout = self.service.config.drain_timeout
        log.info("draining: running requests may end within %g s", timeout)
        try:
            if not await self.service.engine.drain(timeout):
                log.warning("drained: what was still running was aborted")
        finally:
            await self._exit_once_answered()

    async def _exit_once_answered(self) -> None:
        """Ends the server when the answers under way are sent: each ends with an error where the engine has died."""
        end = time.monotonic() + ANSWER_GRACE
        while self._busy() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _busy(self) -> bool:
        """Whether a response is still under way."""
        cycles = (c.cycle for c in self.server_state.connections if isinstance(c, GuardedProtocol))
        return any(cycle is not None and not cycle.response_complete for cycle in cycles)


def make_server(service: Service, on_ready: Callable[[], None] = lambda: None) -> Server:
    """A server for `service`, not yet running: `await server.serve(sockets=[bind(host, port)])`."""
    config = service.config
    protocol: Any = type("Protocol", (GuardedProtocol,), {"header_timeout": config.header_timeout})
    settings = uvicorn.Config(
        create_app(service),
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )
    return Server(settings, service, on_ready)


def serve(
    service: Service,
    sockets: socket.socket | Sequence[socket.socket],
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until a signal has drained the engine; then stops the engine. `on_ready` is called once requests
    are taken. Raises EngineDead when the engine has ended by itself, so that a supervisor starts another process."""
    server = make_server(service, on_ready)
    try:
        server.run(sockets=[sockets] if isinstance(sockets, socket.socket) else list(sockets))
        if threading.current_thread() is threading.main_thread():
            # All is done but to end: a further SIGTERM has nothing to add.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        service.close()
        asyncio.run(service.engine.shutdown())
    if service.engine.died is not None:
        raise EngineDead(f"the engine has stopped: {service.engine.died}")
