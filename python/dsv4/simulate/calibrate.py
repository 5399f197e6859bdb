"""Fits the step model to measured steps: an overhead, and one factor each for reads, arithmetic and copies of states.

A file of measured steps (`dsv4 serve --record-steps FILE`) has one JSON object a line: `us` (time of the step) and `rows`, a list of [first position,
tokens] or [first position, tokens, end of replay], of which the last is not used, as a replayed token costs what any other does; `copies`
(states saved and restored) is optional.

The model of a step is `overhead + collectives + k * copies + sum of max(m * reads, c * arithmetic)`. Which of the two is
larger depends on m and c, so the fit alternates: with the choices fixed it is a linear least-squares problem in relative
error; solve, choose again, until nothing changes. k stays 1 where steps say nothing of it.
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
SIGNIFICANT = 8.0
"""F of one more number in a fit, from which it is kept: one in two hundred is as large by chance."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibrated model and how well it fits."""

    coefficients: dict[str, Any]
    steps: int
    overhead_us: float
    reads: float
    """Reads take this times as long as the roofline said."""
    arithmetic: float
    copies: float
    """The same of copies of states."""
    median_error: float
    """Half of the steps are off by at most this share of their time."""
    p90_error: float
    before: float
    """Median error of the model as it was."""

    def __str__(self) -> str:
        copies = "as assumed" if self.copies == 1 else f"x{self.copies:.2f}"
        return (
            f"fitted to {self.steps} measured steps: overhead {self.overhead_us:,.0f} us, reads x{self.reads:.2f}, "
            f"arithmetic x{self.arithmetic:.2f}, copies {copies}; error {self.median_error:.1%} median, {self.p90_error:.1%} in 9 of 10 "
            f"(before: {self.before:.1%} median)"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured step."""

    us: float
    rows: list[tuple[int, int]]
    """(first position, tokens)."""
    copies: int


def read_steps(path: str) -> list[Measured]:
    """Raises ConfigError naming file, line, field and value."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"measured steps {path}: {getattr(e, 'strerror', None) or e}") from None
    steps = [parse_step(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if len(steps) < 3:
        raise ConfigError(f"{path} has {len(steps)} measured steps; a fit of three numbers needs at least 3")
    return steps


def parse_step(where: str, line: str) -> Measured:
    """One line of such a file. Raises ConfigError that begins with `where`."""
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
    return Measured(float(us), [(r[0], r[1]) for r in rows], copies)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@dataclass(frozen=True, slots=True)
class _Parts:
    """Of each step the roofline's parts, in us."""

    fixed: np.ndarray
    """Collectives, which are taken as they are."""
    copies: np.ndarray
    pairs: list[np.ndarray]
    """Of each row (reads, arithmetic)."""

    @classmethod
    def of(cls, coefficients: Mapping[str, Any], steps: list[Measured]) -> _Parts:
        from dsv4._core import StepModel

        model = StepModel(coefficients)
        parts = [model.parts(s.rows, s.copies) for s in steps]
        copies = coefficients["copy_us"] * np.array([float(s.copies) for s in steps])
        fixed = np.array([p[0] for p in parts]) - coefficients["overhead_us"] - copies
        return cls(fixed, copies, [np.array(p[1]) for p in parts])

    def predict(self, overhead: float, m: float, c: float, k: float) -> np.ndarray:
        rows = np.array([np.maximum(m * p[:, 0], c * p[:, 1]).sum() for p in self.pairs])
        return np.asarray(rows + self.fixed + overhead + k * self.copies)


def predict(coefficients: Mapping[str, Any], steps: list[Measured]) -> np.ndarray:
    """us of each step as the model says it."""
    return _Parts.of(coefficients, steps).predict(coefficients["overhead_us"], 1.0, 1.0, 1.0)


def errors(coefficients: Mapping[str, Any], steps: list[Measured]) -> np.ndarray:
    """By which share of its time the model is off, of each step."""
    times = np.array([s.us for s in steps])
    return np.asarray(np.abs(predict(coefficients, steps) - times) / times)


def scaled(
    coefficients: Mapping[str, Any], overhead_us: float, reads: float, arithmetic: float, copies: float
) -> dict[str, Any]:
    """Coefficients with this overhead and the others times their factor."""
    out = dict(coefficients) | {"overhead_us": overhead_us, "copy_us": coefficients["copy_us"] * copies}
    out |= {name: coefficients[name] * reads for name in READS}
    return out | {name: coefficients[name] * arithmetic for name in ARITHMETIC}


def calibrate(coefficients: Mapping[str, Any], steps: list[Measured]) -> Fit:
    """The model with overhead, reads, arithmetic and copies scaled to the steps. Copies keep their assumed time where another one
    explains the steps no better than chance would: they are often too little of a step to be told."""
    parts = _Parts.of(coefficients, steps)
    times = np.array([s.us for s in steps])
    best, least = _best(parts, times, copies=False)
    free, lower = _best(parts, times, copies=True)
    if (least - lower) * (len(steps) - 4) > SIGNIFICANT * lower:
        best = free
    model = scaled(coefficients, *best)
    off = errors(model, steps)
    return Fit(
        model,
        len(steps),
        *best,
        float(np.median(off)),
        float(np.quantile(off, 0.9)),
        float(np.median(errors(coefficients, steps))),
    )


def _best(
    parts: _Parts, times: np.ndarray, *, copies: bool
) -> tuple[tuple[float, float, float, float], float]:
    """(overhead, m, c, k) and its mean squared error, from the best start. Without `copies` k is 1."""
    best, least = (0.0, 1.0, 1.0, 1.0), np.inf
    for m, c in STARTS:
        found = _alternate(parts, times, m, c, copies)
        error = float(np.mean(((parts.predict(*found) - times) / times) ** 2))
        if error < least:
            best, least = found, error
    return best, least


def _alternate(
    parts: _Parts, times: np.ndarray, m: float, c: float, copies: bool
) -> tuple[float, float, float, float]:
    """(overhead, m, c, k) by alternating choice and least squares, from a start."""
    now = (0.0, m, c, 1.0)
    column = parts.copies if copies else np.zeros_like(times)
    left = times - parts.fixed - (0.0 if copies else parts.copies)
    for _ in range(ROUNDS):
        reads = [now[1] * p[:, 0] >= now[2] * p[:, 1] for p in parts.pairs]
        columns = np.array(
            [(1.0, p[r, 0].sum(), p[~r, 1].sum()) for p, r in zip(parts.pairs, reads, strict=True)]
        )
        columns = np.column_stack([columns, column])
        found = _least_squares(columns / times[:, None], left / times, now)
        if np.allclose(found, now, rtol=1e-9, atol=1e-9):
            break
        now = found
    return now


def _least_squares(
    a: np.ndarray, b: np.ndarray, now: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Least squares without negative numbers; a column that no step has keeps its value."""
    free = [i for i in range(4) if np.any(a[:, i] > 0)]
    while free:
        x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        if np.all(x >= 0):
            break
        free.remove(free[int(np.argmin(x))])
    out = [0.0 if np.any(a[:, i] > 0) else now[i] for i in range(4)]
    for i, value in zip(free, x if free else (), strict=True):
        out[i] = float(value)
    return out[0], max(out[1], 1e-9), max(out[2], 1e-9), out[3]
