"""A record of how long steps took, for `dsv4 simulate --step-model FILE`."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

from dsv4._core import REPLAY
from dsv4.engine.buffers import StepPlan
from dsv4.errors import ConfigError

log = logging.getLogger("dsv4.engine")


class StepRecord:
    """Appends one JSON line per step: `us`, `rows` as [first position, tokens, end of replay or 0], `copies`.

    It never fails a step: when a line cannot be written it says so once and records no more.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._path: Path | None = Path(path)
        try:
            # A pipe without a reader would hold up the engine, at start or at any step.
            pipe = self._path.exists() and stat.S_ISFIFO(self._path.stat().st_mode)
            if not pipe:
                open(path, "a").close()
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"record_steps is {path!r}, which cannot be written: {getattr(e, 'strerror', None) or e}; "
                "give the path of a file"
            ) from None
        if pipe:
            raise ConfigError(f"record_steps is {path!r}, which is a pipe; give the path of a file")

    def __call__(self, plan: StepPlan, us: float) -> None:
        if self._path is None:
            return
        try:
            # Opened each time: tens of microseconds, and nothing to close or to lose.
            with open(self._path, "ab", buffering=0) as file:
                line = _line(plan, us)
                written = file.write(line) or 0
                if written < len(line):  # the disk is full: no half line stays
                    file.truncate(file.tell() - written)
                    raise OSError("the disk is full")
        except Exception as e:
            log.warning("record_steps %s: %s; no more steps are recorded", self._path, e)
            self._path = None


def _line(plan: StepPlan, us: float) -> bytes:
    columns = (plan.row_start, plan.row_len, plan.row_replay_end, plan.row_flags)
    rows = [
        [start, length, end if flags & REPLAY else 0]
        for start, length, end, flags in zip(*(c.tolist() for c in columns), strict=True)
    ]
    line = {"us": round(us, 1), "rows": rows, "copies": plan.copies}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
