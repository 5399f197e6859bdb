"""Fits the step model to measured steps: an overhead, and one factor each for reads and for arithmetic.

A file of measured steps (`dsv4 serve --record-steps FILE`) has one JSON object a line: `us` (time of the step) and `rows`, a list of [first position,
tokens] or [first position, tokens, end of replay]; `copies` (states saved and restored) is optional.

The model of a step is `overhead + collectives + copies + sum of max(m * reads, c * arithmetic)`. Which of the two is
larger depends on m and c, so the fit alternates: with the choices fixed it is a linear least-squares problem in relative
error; solve, choose again, until nothing changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.errors import ConfigError
from dsv4.simulate.device import ARITHMETIC, READS

ROUNDS = 50
STARTS = ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (1.0, 16.0), (16.0, 1.0))
"""Where the alternation starts: (m, c)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibrated model and how well it fits."""

    coefficients: dict[str, Any]
    steps: int
    overhead_us: float
    reads: float
    """Reads take this times as long as the roofline said."""
    arithmetic: float
    median_error: float
    """Half of the steps are off by at most this share of their time."""
    p90_error: float
    before: float
    """Median error of the model as it was."""

    def __str__(self) -> str:
        return (
            f"fitted to {self.steps} measured steps: overhead {self.overhead_us:,.0f} us, reads x{self.reads:.2f}, "
            f"arithmetic x{self.arithmetic:.2f}; error {self.median_error:.1%} median, {self.p90_error:.1%} in 9 of 10 "
            f"(before: {self.before:.1%} median)"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured step."""

    us: float
    rows: list[tuple[int, int, int]]
    copies: int


def read_steps(path: str) -> list[Measured]:
    """Raises ConfigError naming file, line, field and value."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"measured steps {path}: {getattr(e, 'strerror', None) or e}") from None
    steps = [_step(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if len(steps) < 3:
        raise ConfigError(f"{path} has {len(steps)} measured steps; a fit of three numbers needs at least 3")
    return steps


def _step(where: str, line: str) -> Measured:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{where}: it is no JSON, column {e.colno}: {e.msg}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: it must be an object with us and rows")
    us, rows, copies = record.get("us"), record.get("rows"), record.get("copies", 0)
    if not isinstance(us, (int, float)) or isinstance(us, bool) or not 0 < us < 1e12:
        raise ConfigError(f"{where}: us is {us!r}; it must be a time in microseconds above 0")
    if not _whole(copies):
        raise ConfigError(f"{where}: copies is {copies!r}; it must be a whole number from 0")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where}: rows is {rows!r}; it must be a list of [position, tokens]")
    for row in rows:
        if not isinstance(row, list) or len(row) not in (2, 3) or not all(map(_whole, row)) or row[1] == 0:
            raise ConfigError(
                f"{where}: rows has {row!r}; a row is [position, tokens] or [position, tokens, replay end]"
            )
    return Measured(float(us), [(r[0], r[1], r[2] if len(r) == 3 else 0) for r in rows], copies)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def calibrate(coefficients: Mapping[str, Any], steps: list[Measured]) -> Fit:
    """The model with overhead, reads and arithmetic scaled to the steps."""
    from dsv4._core import StepModel

    model = StepModel(coefficients)
    parts = [model.parts(s.rows, s.copies) for s in steps]
    times = np.array([s.us for s in steps])
    # What is left of the fixed part without the overhead is taken as it is.
    fixed = np.array([p[0] for p in parts]) - coefficients["overhead_us"]
    pairs = [np.array(p[1]) for p in parts]

    def predict(overhead: float, m: float, c: float) -> np.ndarray:
        return np.array([np.maximum(m * p[:, 0], c * p[:, 1]).sum() for p in pairs]) + fixed + overhead

    best, least = (coefficients["overhead_us"], 1.0, 1.0), np.inf
    for m, c in STARTS:
        found = _alternate(pairs, times - fixed, times, m, c)
        error = float(np.mean(((predict(*found) - times) / times) ** 2))
        if error < least:
            best, least = found, error
    overhead, m, c = best
    errors = np.abs(predict(*best) - times) / times
    scaled = dict(coefficients) | {"overhead_us": overhead}
    scaled |= {k: coefficients[k] * m for k in READS} | {k: coefficients[k] * c for k in ARITHMETIC}
    before = np.abs(predict(coefficients["overhead_us"], 1.0, 1.0) - times) / times
    return Fit(
        scaled,
        len(steps),
        overhead,
        m,
        c,
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
        float(np.median(before)),
    )


def _alternate(
    pairs: list[np.ndarray], left: np.ndarray, times: np.ndarray, m: float, c: float
) -> tuple[float, float, float]:
    """(overhead, m, c) by alternating choice and least squares, from a start."""
    overhead = 0.0
    for _ in range(ROUNDS):
        reads = [m * p[:, 0] >= c * p[:, 1] for p in pairs]
        columns = np.array([(1.0, p[r, 0].sum(), p[~r, 1].sum()) for p, r in zip(pairs, reads, strict=True)])
        found = _least_squares(columns / times[:, None], left / times, (overhead, m, c))
        if np.allclose(found, (overhead, m, c), rtol=1e-9, atol=1e-9):
            break
        overhead, m, c = found
    return overhead, m, c


def _least_squares(
    a: np.ndarray, b: np.ndarray, now: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Least squares without negative numbers; a column that no step has keeps its value."""
    free = [i for i in range(3) if np.any(a[:, i] > 0)]
    while free:
        x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        if np.all(x >= 0):
            break
        free.remove(free[int(np.argmin(x))])
    out = [0.0 if np.any(a[:, i] > 0) else now[i] for i in range(3)]
    for i, value in zip(free, x if free else (), strict=True):
        out[i] = float(value)
    return out[0], max(out[1], 1e-9), max(out[2], 1e-9)
