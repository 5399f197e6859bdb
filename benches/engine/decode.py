"""Decode steps: wall time, the GPU's busy time, and its idle share."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from benches.engine.driver import Driver

PROFILED = 12


def decode(driver: Driver, rows: int, context: int) -> dict[str, Any]:
    """`rows` requests that decode after prompts of `context` tokens, none of which is a prefix of another. idle = 1 - busy / wall; the
    wall time is taken without the profiler."""
    jobs = [
        driver.job(driver.ids(context), 100_000) for _ in range(rows)
    ]  # the first decodes while the others are read
    driver.run(until=lambda: all(job.times for job in jobs))
    for _ in range(min(10, driver.steps)):
        driver.engine.step()
    at = len(jobs[0].times)
    ends = driver.run(until=lambda: len(jobs[0].times) >= at + driver.steps)
    wall = 1e3 * median(np.diff(ends))
    busy = driver.busy(min(PROFILED, driver.steps))
    driver.clear()
    found = {"rows": rows, "context": context, "wall_ms": wall, "tokens_s": 1e3 * rows / wall, **busy}
    return found | ({"idle": 1 - busy["busy_ms"] / wall} if busy else {})
