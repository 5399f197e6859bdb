"""How late this process itself is: what it adds to the times that it measures."""

from __future__ import annotations

import asyncio
from array import array

from dsv4.bench.connection import clock

EVERY = 0.01
"""Seconds between looks."""


class Lag:
    """Delays of the event loop in seconds, one each time that it was looked at. The loop's timers have steps of a millisecond."""

    def __init__(self) -> None:
        self.seconds = array("d")

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            begun = clock()
            await asyncio.sleep(EVERY)
            self.seconds.append(max(clock() - begun - EVERY, 0.0))
