"""Intervals of figures by the bootstrap: how far they would move with other requests of the same kind.

Requests are drawn anew, each with all that it has (its gaps between tokens stay together, as they are alike). That requests wait
for each other is not part of it, so of a crowded server the intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORK = 2e7
"""Values that are looked at for one figure; of very many there are fewer draws."""
DRAWS, FEWEST = 400, 40
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the bounds within which 95% of the draws lie; equal where there is one request."""

    value: float
    low: float
    high: float

    @property
    def listed(self) -> list[float]:
        return [self.value, self.low, self.high]


def quantiles(
    values: Sequence[np.ndarray], at: Sequence[float], rng: np.random.Generator
) -> dict[str, Estimate] | None:
    """`mean` and a `p50` for each 0.5 in `at`, of all values together. `values`: one array a request. None where there are none.
    A quantile is one of the values: the smallest that so large a share does not exceed."""
    joined = np.concatenate([np.asarray(v, np.float64) for v in values]) if values else np.zeros(0)
    if not len(joined):
        return None
    owners = np.repeat(np.arange(len(values)), [len(v) for v in values])
    order = np.argsort(joined, kind="stable")
    joined, owners = joined[order], owners[order]
    own = _of(joined, np.ones(len(joined)), at)
    draws = int(min(max(WORK / len(joined), FEWEST), DRAWS))
    found = []
    for _ in range(draws):
        taken = np.bincount(rng.integers(len(values), size=len(values)), minlength=len(values))
        weights = taken[owners].astype(np.float64)
        if weights.any():
            found.append(_of(joined, weights, at))
    names = ["mean", *(f"p{100 * q:g}" for q in at)]
    return {name: _bounds(v, column) for name, v, column in zip(names, own, np.array(found).T, strict=True)}


def total(values: np.ndarray, over: float, rng: np.random.Generator) -> Estimate:
    """The sum of one value a request, divided by `over` (seconds, or requests)."""
    values = np.asarray(values, np.float64)
    if not len(values) or over <= 0:
        return Estimate(0.0, 0.0, 0.0)
    draws = int(min(max(WORK / len(values), FEWEST), DRAWS))
    sums = np.array([values[rng.integers(len(values), size=len(values))].sum() for _ in range(draws)])
    return _bounds(float(values.sum()) / over, sums / over)


def ratio(upper: np.ndarray, lower: np.ndarray, rng: np.random.Generator) -> Estimate | None:
    """Of two sums over the same requests."""
    upper, lower = np.asarray(upper, np.float64), np.asarray(lower, np.float64)
    if not lower.sum():
        return None
    draws, found = int(min(max(WORK / len(upper), FEWEST), DRAWS)), []
    for _ in range(draws):
        taken = rng.integers(len(upper), size=len(upper))
        if below := lower[taken].sum():
            found.append(upper[taken].sum() / below)
    return _bounds(float(upper.sum() / lower.sum()), np.array(found))


def _of(values: np.ndarray, weights: np.ndarray, at: Sequence[float]) -> list[float]:
    """Mean and quantiles of sorted values that count `weights` times each."""
    sums = np.cumsum(weights)
    # A little less, as 0.9 * 10 is above 9 in binary.
    places = np.searchsorted(sums, np.asarray(at) * sums[-1] * (1 - 1e-12), side="left")
    return [float(values @ weights / sums[-1]), *values[np.minimum(places, len(values) - 1)].tolist()]


def _bounds(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
