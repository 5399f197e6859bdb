"""Whether the engine is idle, at work or stuck."""

from __future__ import annotations

import time
from collections.abc import Callable


class Liveness:
    """A clock that runs only while there is work. One thread calls `begin`, `progress` and `rest`; any may ask."""

    def __init__(self, stuck_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`stuck_after`: seconds with work at hand and no step ending after which the engine counts as stuck."""
        self.stuck_after, self._clock = stuck_after, clock
        self._since: float | None = None

    def begin(self) -> None:
        """There is something to do: the clock starts, unless it runs already."""
        if self._since is None:
            self._since = self._clock()

    def progress(self) -> None:
        """A step has ended: the clock starts anew."""
        self._since = self._clock()

    def rest(self) -> None:
        """Nothing is left to do: the clock stops, for as long as that may be."""
        self._since = None

    @property
    def idle(self) -> bool:
        """Whether the clock stands still."""
        return self._since is None

    def stuck(self) -> float | None:
        """Seconds since the last sign of life, when they are too many."""
        since = self._since
        waited = 0.0 if since is None else self._clock() - since
        return waited if waited > self.stuck_after else None
