"""One HTTP/1.1 connection that takes one request at a time, over uvloop and httptools.

Clients of general use take about 100 us of a core for an event of a stream; thousands of streams leave no room for that.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httptools

from dsv4.bench.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

clock = time.perf_counter
"""The clock of all times here, in seconds."""


class Connection(asyncio.Protocol):
    """Kept for the next request when a response ends whole and the server keeps it."""

    def __init__(self, idle: Callable[[Connection], None]) -> None:
        """`idle` is called when it can take a request again."""
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._now, self._status, self._seen, self.used = 0.0, 0, False, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    @property
    def open(self) -> bool:
        """Whether it can be written to."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def seen(self) -> bool:
        """Whether a byte of the response has come."""
        return self._seen

    def send(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """Done when the answer has ended, well or not; never raises."""
        assert self._transport is not None and self._answer is None
        self._answer, self._parser, self._seen = answer, httptools.HttpResponseParser(self), False
        self._done = asyncio.get_running_loop().create_future()
        answer.sent = clock()
        self._transport.write(request)
        self.used += 1
        return self._done

    def close(self) -> None:
        """At once, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()
        self._finish()

    # of asyncio
    def data_received(self, data: bytes) -> None:
        self._now = clock()
        if self._parser is None or self._answer is None:  # nothing was asked
            self.close()
            return
        self._seen = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            if self._answer is not None:
                self._answer.fail("no HTTP", e)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if (answer := self._answer) is None:
            return
        if self._seen and self._status == 200 and answer.stream and answer.said:
            answer.end = clock()  # a body that ends with the connection
            answer.ended(200)
        else:
            after = f"after {answer.events} events" if self._seen else "before any answer"
            answer.fail("cut off" if self._seen else "connection lost", f"{exc or 'closed'} {after}")
        self._finish()

    # of httptools
    def on_headers_complete(self) -> None:
        assert self._parser is not None and self._answer is not None
        self._status = self._parser.get_status_code()
        if self._status != 200:
            self._answer.stream = False

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(body, self._now)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._status < 200 or self._answer is None:  # 100 Continue
            return
        keep = self._parser.should_keep_alive()
        self._answer.end = self._now
        self._answer.ended(self._status)
        self._finish()
        if keep and self.open:
            self._idle(self)
        elif self._transport is not None:
            self._transport.close()

    def _finish(self) -> None:
        answer, done = self._answer, self._done
        self._answer = self._done = self._parser = None
        if answer is not None and not answer.end:
            answer.end = clock()
        if done is not None and not done.done():
            done.set_result(None)
