"""A record of how long steps took, for `dsv4 simulate --step-model FILE`."""

from __future__ import annotations

import json

from dsv4._core import StepHeader
from dsv4.engine.buffers import StepBuffers
from dsv4.errors import ConfigError

REPLAY = 8
"""Bit of `row_flags` of a row that rebuilds state."""


class StepRecord:
    """Appends one JSON line per step: `us`, `rows` as [first position, tokens, end of replay or 0], `copies`."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._path = path
        try:
            open(path, "a").close()
        except OSError as e:
            raise ConfigError(f"record_steps {path}: {e.strerror}") from None

    def __call__(self, header: StepHeader, buffers: StepBuffers, us: float) -> None:
        n = header.rows
        rows = [
            [start, length, end if flags & REPLAY else 0]
            for start, length, end, flags in zip(
                buffers.row_start[:n].tolist(),
                buffers.row_len[:n].tolist(),
                buffers.row_replay_end[:n].tolist(),
                buffers.row_flags[:n].tolist(),
                strict=True,
            )
        ]
        line = {"us": round(us, 1), "rows": rows, "copies": header.saves + header.restores}
        # Opened each time: tens of microseconds, and nothing to close or to lose.
        with open(self._path, "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
