"""A fit of the step model that is judged by steps which it has not seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table

from dsv4.errors import ConfigError
from dsv4.simulate.calibrate import Fit, Measured, calibrate, errors, predict
from dsv4.simulate.shapes import kind_of

HELD = 5
"""One step of so many is held back."""
LEAST = 20
"""Steps that a fit of four numbers takes here."""
ODD, ALIKE = 3.0, 5
"""A step is left out when it took so many times the median of its kind, of which there are at least so many: something else ran then."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A fit, and how far it is off on steps held back."""

    fit: Fit
    held: list[Measured]
    left_out: int
    median_error: float
    p90_error: float


def fit(coefficients: Mapping[str, Any], steps: list[Measured]) -> Judged:
    """Fits four steps of five and judges by the fifth. Raises ConfigError where there are too few."""
    by_kind = _by_kind(steps)
    kept = [s for alike in by_kind.values() for s in _without_odd(alike)]
    if len(kept) < LEAST:
        raise ConfigError(
            f"{len(kept)} steps were measured; a fit takes {LEAST}: give more --seconds, a larger --max-num-seqs or --max-model-len"
        )
    held = kept[HELD - 1 :: HELD]
    seen = [s for i, s in enumerate(kept) if i % HELD != HELD - 1]
    found = calibrate(coefficients, seen)
    off = errors(found.coefficients, held)
    return Judged(found, held, len(steps) - len(kept), float(np.median(off)), float(np.quantile(off, 0.9)))


def _by_kind(steps: list[Measured]) -> dict[str, list[Measured]]:
    out: dict[str, list[Measured]] = defaultdict(list)
    for step in steps:
        out[kind_of(step)].append(step)
    return out


def _without_odd(alike: list[Measured]) -> list[Measured]:
    if len(alike) < ALIKE:
        return alike
    most = ODD * median(s.us for s in alike)
    return [s for s in alike if s.us <= most]


def table(judged: Judged) -> Table:
    """Of the steps held back, by kind: measured and predicted medians in ms, and the median error."""
    out = Table("steps not fitted", box=MARKDOWN)
    for name in ("steps", "measured, ms", "predicted, ms", "error"):
        out.add_column(name, justify="right")
    model = judged.fit.coefficients
    for kind, alike in sorted(_by_kind(judged.held).items(), key=lambda item: median(s.us for s in item[1])):
        out.add_row(
            kind,
            f"{len(alike)}",
            f"{median(s.us for s in alike) / 1000:.2f}",
            f"{float(np.median(predict(model, alike))) / 1000:.2f}",
            f"{float(np.median(errors(model, alike))):.1%}",
        )
    return out
