"""A rank that does not do what it should: `python -m tests.support.breaking_rank`. What it does is said by the environment: at step
BREAKS_AT it raises, before or after it has taken the step, or waits without an end (BREAKS_HOW: raise, raise after, hang)."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from dsv4.engine import follower, ranked

_STEPS = itertools.count(1)


def main() -> None:
    at, how = int(os.environ["BREAKS_AT"]), os.environ["BREAKS_HOW"]
    follow = ranked.FollowingDevice.follow

    def breaks(self: Any, *arguments: Any) -> None:
        step = next(_STEPS)
        if step == at and how == "raise":
            raise ValueError("a rank's own fault")
        if step == at and how == "hang":
            time.sleep(1e6)
        follow(self, *arguments)
        if step == at and how == "raise after":
            raise ValueError("a rank's own fault")

    ranked.FollowingDevice.follow = breaks  # type: ignore[method-assign]
    follower.main()


if __name__ == "__main__":
    main()
