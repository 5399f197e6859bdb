"""The highest rate that keeps the goals, by doubling and then halving the ratio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

STEPS_DOWN = 10
"""Halvings of the first rate after which no rate is said to keep the goals."""
STEPS_UP = 20


@dataclass(frozen=True, slots=True)
class Found:
    """Requests a second."""

    kept: float | None
    """The highest rate tried that kept the goals."""
    missed: float | None
    """The lowest rate tried above it that did not."""


async def highest(tried: Callable[[float], Awaitable[bool]], first: float, precision: float) -> Found:
    """`tried` runs a rate and says whether the goals were kept. Ends when `missed / kept` is at most 1 + `precision`. A server that
    keeps them at one rate and not at a lower one makes the search end at either."""
    kept, missed, rate = None, None, first
    for _ in range(STEPS_UP):
        if await tried(rate):
            kept, rate = rate, rate * 2
            if missed is not None:
                break
        else:
            missed, rate = rate, rate / 2
            if kept is not None or missed <= first / 2**STEPS_DOWN:
                break
    while kept is not None and missed is not None and missed / kept > 1 + precision:
        middle = (kept * missed) ** 0.5
        if await tried(middle):
            kept = middle
        else:
            missed = middle
    return Found(kept, missed)
