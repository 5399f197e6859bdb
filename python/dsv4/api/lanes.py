"""Threads for what would hold up the event loop. Short work never waits for long work, and a long text is encoded a batch at
a time, so that others come in between and a client that is gone costs no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from dsv4.text.draft import BATCH, Batch, Draft

T = TypeVar("T")

INLINE = 1024
"""Characters of text that are encoded where they are, in well under a millisecond."""

QUICK = 16384
"""Bytes of a body that is parsed and checked where it is."""

ENDLESS = 4 * BATCH
"""Characters of a batch that could not be cut; it goes to a thread that nothing else waits for."""


class Lanes:
    """One server's threads by how long their work takes."""

    def __init__(self) -> None:
        self.width = min(8, max(2, (os.cpu_count() or 2) // 2))
        """Batches of one prompt that are encoded at once."""
        self._short = ThreadPoolExecutor(2, "dsv4-short")
        self._long = ThreadPoolExecutor(self.width, "dsv4-long")
        self._endless = ThreadPoolExecutor(1, "dsv4-endless")

    async def run(self, work: Callable[[], T], *, size: int) -> T:
        """`work()` on a body of `size` bytes, on a thread when these are too many for the event loop."""
        if size <= QUICK:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._lane(size), work)

    async def encode(self, begin: Callable[[], Draft], *, size: int) -> np.ndarray:
        """The ids of the draft that `begin` makes of `size` characters: int32 [tokens]. Cancelling it gives up what is not
        yet encoded. Raises what the draft raises."""
        draft = await self.run(begin, size=size)
        running = set[asyncio.Future[Batch]]()
        try:
            for batch in draft.batches():
                if size <= INLINE:
                    draft.take(batch.run())
                    continue
                lane = self._endless if batch.size > ENDLESS else self._lane(size)
                running.add(asyncio.get_running_loop().run_in_executor(lane, batch.run))
                if len(running) == self.width:
                    running = await _taken(draft, running)
            while running:
                running = await _taken(draft, running)
        finally:
            for future in running:
                future.cancel()
        return await self.run(draft.ids, size=size)

    def close(self) -> None:
        """Lets running work end and forgets the rest."""
        for lane in (self._short, self._long, self._endless):
            lane.shutdown(wait=False, cancel_futures=True)

    def _lane(self, size: int) -> Executor:
        return self._short if size <= BATCH else self._long


async def _taken(draft: Draft, running: set[asyncio.Future[Batch]]) -> set[asyncio.Future[Batch]]:
    """Waits for a batch and gives it to the draft; what is still running."""
    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        draft.take(future.result())
    return running
