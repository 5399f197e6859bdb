"""`dsv4 serve` over the scripted process, with its event loop watched: `python -m benches.lag FILE FLAGS…`.

How much a turn of the loop computes is how long everybody else waits for it on a core that is free; as it is counted in time of the
thread, neighbours on the machine do not disturb it. At the end quantiles of the turns that were sampled are written to FILE.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from dsv4.api.server import Server
from dsv4.cli import main
from dsv4.engine import remote

EVERY = 0.005
"""Seconds between two samples."""


class Watch:
    """Samples turns of a loop. It is created on it."""

    def __init__(self) -> None:
        self._loop, self.turns = asyncio.get_running_loop(), list[float]()
        self._loop.call_later(EVERY, self._begin)

    def _begin(self) -> None:
        self._loop.call_soon(self._end, time.thread_time())

    def _end(self, begun: float) -> None:
        self.turns.append(time.thread_time() - begun)
        self._loop.call_later(EVERY, self._begin)

    def told(self) -> dict[str, float]:
        """Milliseconds."""
        ordered = sorted(self.turns) or [0.0]
        at = {
            q: ordered[min(int(float(q) * len(ordered)), len(ordered) - 1)]
            for q in ("0.5", "0.99", "0.999", "1")
        }
        return {q: round(1e3 * t, 2) for q, t in at.items()} | {"turns": len(self.turns)}


def serve(file: Path, flags: list[str]) -> int:
    """The server; the file is there when it has ended."""
    watches: list[Watch] = []
    startup = Server.startup

    async def watched(self: Server, *arguments: Any, **more: Any) -> None:
        await startup(self, *arguments, **more)
        watches.append(Watch())

    Server.startup = watched  # type: ignore[method-assign]
    remote.PROCESS = "tests.support.scripted_process"
    try:
        return main(["serve", "--port", "0", "--log-level", "warning", *flags])
    finally:
        file.write_text(json.dumps([w.told() for w in watches]))


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), sys.argv[2:]))
