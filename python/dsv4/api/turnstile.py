"""Lets a bounded number of requests begin at each turn of the event loop. When thousands come at once, streams and probes have their turn in
between."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 32
"""To read and check one takes some tenths of a millisecond."""


class Turnstile:
    """First come, first served. On one event loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once, self._left = at_once, at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def wait(self) -> None:
        """Until it is this request's turn, which is at once where few come."""
        loop = asyncio.get_running_loop()
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn, loop)
        if self._left > 0:
            self._left -= 1
            return
        place: asyncio.Future[None] = loop.create_future()
        self._waiting.append(place)
        await place

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left, self._turning = self._at_once, False
        while self._waiting and self._left:
            place = self._waiting.popleft()
            if not place.done():  # its client may have gone away
                place.set_result(None)
                self._left -= 1
        if self._waiting or self._left < self._at_once:
            self._turning = True
            loop.call_soon(self._turn, loop)
