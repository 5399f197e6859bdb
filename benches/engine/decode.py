"""Decode steps: wall time, the GPU's busy time, and its idle share."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from benches.engine.driver import Driver

STEPS, PROFILED = 60, 12


def decode(driver: Driver, rows: int, context: int) -> dict[str, Any]:
    """`rows` requests that decode after prompts of `context` tokens, none of which is a prefix of another. idle = 1 - busy / wall; the
    wall time is taken without the profiler."""
    n = 8 * rows + STEPS + 4 * PROFILED + 200
    jobs = [driver.job(driver.ids(context), n) for _ in range(rows)]
    driver.run(until=lambda: all(job.times for job in jobs))
    for _ in range(10):
        driver.llm.step()
    at = len(jobs[0].times)
    ends = driver.run(until=lambda: len(jobs[0].times) >= at + STEPS)
    wall = 1e3 * median(np.diff(ends))
    busy, kernels = driver.busy(PROFILED)
    assert all(len(job.times) < n for job in jobs), "a request ended while it was measured"
    driver.clear()
    return {
        "rows": rows,
        "context": context,
        "wall_ms": wall,
        "busy_ms": busy,
        "idle": 1 - busy / wall,
        "kernels": kernels,
        "tokens_s": 1e3 * rows / wall,
    }
