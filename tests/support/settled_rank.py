"""A rank that takes no step while its collector of garbage would look through what stays: `python -m tests.support.settled_rank`."""

from __future__ import annotations

import gc
from typing import Any

from dsv4.engine import follower, ranked


def main() -> None:
    follow = ranked.FollowingDevice.follow

    def settled(self: Any, *arguments: Any) -> None:
        if (seen := len(gc.get_objects())) > gc.get_freeze_count() // 4:
            raise ValueError(f"{seen:,} objects are looked through, {gc.get_freeze_count():,} are not")
        follow(self, *arguments)

    ranked.FollowingDevice.follow = settled  # type: ignore[method-assign]
    follower.main()


if __name__ == "__main__":
    main()
