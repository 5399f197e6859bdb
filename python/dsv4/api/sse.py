"""A stream of server-sent events: headers sent late, so that a refusal still has its status; comments while
nothing comes; a bound on what a client has not read yet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from dsv4.api.errors import internal_error
from dsv4.api.http import Call, ClientGone
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.api.protocol import GuardedProtocol

log = logging.getLogger("dsv4.api")

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
)

Headers = tuple[tuple[bytes, bytes], ...]

MAX_HELD = 4 * 2**20
"""Bytes of a stream that wait for its client to read. Beyond the connection's own buffers."""


class EventStream:
    """`async with EventStream(call, on_error=…) as stream: await stream.send(b"data: …\\n\\n")`.

    The response begins with the first frame or the first comment, whichever comes first. An error before that
    leaves as an ordinary HTTP error; after it, `on_error(error)` gives the terminal event and the stream is
    closed properly.
    """

    def __init__(
        self, call: Call, *, on_error: Callable[[RequestError], bytes], headers: Headers = ()
    ) -> None:
        """`headers`: further ones of the response."""
        self.call, self.on_error, self._headers = call, on_error, (*_HEADERS, *headers)
        self.progress = "waiting"
        """What the keep-alive comment says."""
        self._last = time.monotonic()
        self._pinger: asyncio.Task[None] | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._sender: asyncio.Task[None] | None = None
        self._connection: GuardedProtocol | None = call.scope.get("dsv4_connection")

    async def __aenter__(self) -> EventStream:
        self._pinger = asyncio.ensure_future(self._ping())
        return self

    async def send(self, frames: bytes) -> None:
        """Sends whole frames. While the client reads slowly they are kept, so that the engine's outputs need not be. Raises
        ClientGone, and closes the connection, when they become too many."""
        if not self.call.started:
            await self.call.start(200, self._headers)
        self._last = time.monotonic()
        if self._sender is None and not (self._connection is not None and self._connection.write_paused):
            await self._send(frames)
            return
        self._held.append(frames)
        self._held_bytes += len(frames)
        if self._held_bytes > MAX_HELD:
            assert self._connection is not None
            self._connection.abort(f"has not read {self._held_bytes} bytes of its stream")
            raise ClientGone("slow_reader")
        self._sender = self._sender or asyncio.ensure_future(self._send_held())

    async def _send_held(self) -> None:
        while self._held:
            frames, self._held, self._held_bytes = b"".join(self._held), [], 0
            await self._send(frames)  # waits for the client
        self._sender = None

    async def _send(self, frames: bytes) -> None:
        await self.call.send({"type": "http.response.body", "body": frames, "more_body": True})

    async def _ping(self) -> None:
        interval = self.call.service.config.ping_interval
        while True:
            await asyncio.sleep(max(self._last + interval - time.monotonic(), 0.01))
            if time.monotonic() - self._last >= interval:
                with contextlib.suppress(ClientGone):
                    await self.send(b": %b\n\n" % self.progress.encode())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._pinger is not None
        self._pinger.cancel()
        if error is not None and (
            not self.call.started or isinstance(error, ClientGone) or not isinstance(error, Exception)
        ):
            if self._sender is not None:
                self._sender.cancel()
            return False
        if self._sender is not None:
            await self._sender
        if error is not None:
            self.call.record.reason = error.code if isinstance(error, RequestError) else "internal_error"
            if not isinstance(error, RequestError):
                log.error("%s failed", self.call.request_id, exc_info=error)
                error = internal_error(self.call.request_id)
            await self._send(self.on_error(error))
        if not self.call.started:
            await self.call.start(200, self._headers)
        await self.call.send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
