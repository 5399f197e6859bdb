"""A stream of server-sent events: headers sent late, so that a refusal still has its status; comments while
nothing comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType

from dsv4.api.errors import internal_error
from dsv4.api.http import Call
from dsv4.errors import RequestError

log = logging.getLogger("dsv4.api")

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
)


class EventStream:
    """`async with EventStream(call, on_error=…) as stream: await stream.send(b"data: …\\n\\n")`.

    The response begins with the first frame or the first comment, whichever comes first. An error before that
    leaves as an ordinary HTTP error; after it, `on_error(error)` gives the terminal event and the stream is
    closed properly.
    """

    def __init__(self, call: Call, *, on_error: Callable[[RequestError], bytes]) -> None:
        self.call, self.on_error = call, on_error
        self.progress = "waiting"
        """What the keep-alive comment says."""
        self._last = time.monotonic()
        self._pinger: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._pinger = asyncio.ensure_future(self._ping())
        return self

    async def send(self, frames: bytes) -> None:
        """Sends whole frames; waits while the client reads slowly."""
        if not self.call.started:
            await self.call.start(200, _HEADERS)
        self._last = time.monotonic()
        await self.call.send({"type": "http.response.body", "body": frames, "more_body": True})

    async def _ping(self) -> None:
        interval = self.call.service.config.ping_interval
        while True:
            await asyncio.sleep(max(self._last + interval - time.monotonic(), 0.01))
            if time.monotonic() - self._last >= interval:
                await self.send(b": %b\n\n" % self.progress.encode())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._pinger is not None
        self._pinger.cancel()
        if error is not None and (not self.call.started or not isinstance(error, Exception)):
            return False
        if error is not None:
            if not isinstance(error, RequestError):
                log.error("%s failed", self.call.request_id, exc_info=error)
                error = internal_error(self.call.request_id)
            await self.call.send(
                {"type": "http.response.body", "body": self.on_error(error), "more_body": True},
            )
        if not self.call.started:
            await self.call.start(200, _HEADERS)
        await self.call.send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
