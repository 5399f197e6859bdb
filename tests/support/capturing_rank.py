"""A rank that "captures" its steps on the CPU: `python -m tests.support.capturing_rank`."""

from __future__ import annotations

from dsv4.engine import build, follower
from dsv4.model.v4 import V4Model


def main() -> None:
    build._why_eager = lambda config: None
    build.Recorder = lambda: lambda run, before: run  # type: ignore[assignment, misc]
    V4Model.uncaptured = lambda self: []  # type: ignore[method-assign]
    follower.main()


if __name__ == "__main__":
    main()
