"""Prompts: how fast they are read, cold and out of the cache, alone and beside running decodes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from benches.engine.driver import Driver, Job

PROFILED = 4
LONG_S = 20.0


def cold(driver: Driver, tokens: int) -> dict[str, Any]:
    """A prompt that nothing is known of, the second of its length: its rate, and wall and busy time of its last steps. The first where that
    takes long: then it is read alone."""
    job = driver.job(driver.ids(tokens))
    ends = driver.run()
    if job.ttft > LONG_S:
        return {
            "tokens": tokens,
            "ttft_ms": 1e3 * job.ttft,
            "tokens_s": tokens / job.ttft,
            "steps": len(ends),
        }
    job = driver.job(driver.ids(tokens))
    ends = driver.run()
    steps = np.diff(ends[-PROFILED - 2 : -1])
    third = driver.job(driver.ids(tokens))
    for _ in range(
        max(0, len(ends) - PROFILED - 2)
    ):  # to the last steps, whose histories are as long as those of the wall time
        driver.engine.step()
    busy = driver.busy(min(PROFILED, max(1, len(ends) - 2)))
    driver.run()
    assert third.times
    found = {
        "tokens": tokens,
        "ttft_ms": 1e3 * job.ttft,
        "tokens_s": tokens / job.ttft,
        "steps": len(ends),
        **busy,
    }
    if len(steps):
        found["wall_ms"] = 1e3 * median(steps)
        if busy:
            found["idle"] = 1 - busy["busy_ms"] / found["wall_ms"]
    return found


def asked(driver: Driver, ids: np.ndarray) -> tuple[Job, float]:
    """A request for one token when it is over, and the milliseconds from its submission until the host had launched its first step
    (of an engine that waits for each step: until it was over)."""
    job = driver.job(ids)
    driver.engine.step()
    launched = 1e3 * (time.perf_counter() - job.begun)
    driver.run()
    return job, launched


def cached(driver: Driver, tokens: int, new: int) -> dict[str, Any]:
    """A prompt whose first `tokens` tokens were read before and whose last `new` were not: median times to its first launch and token of up to
    five."""
    base = driver.ids(tokens)
    driver.job(base)
    driver.run()
    times, launches, computed = [], [], 0
    for _ in range(1 + min(5, driver.steps)):
        job, launched = asked(driver, np.concatenate((base, driver.ids(new))))
        times.append(1e3 * job.ttft)
        launches.append(launched)
        computed = tokens + new - (job.cached or 0)
    found = {"tokens": tokens, "new": new, "ttft_ms": median(times[1:]), "launch_ms": median(launches[1:])}
    return found | {"not_cached": computed}


def turns(driver: Driver, tokens: int, new: int = 64, answer: int = 40) -> dict[str, Any]:
    """A prompt that nothing is known of, read once; decode steps of its answer; the same prompt again with `new` tokens behind it, twice; and the
    conversation's next turn, which has the answer and `new` tokens."""
    base = driver.ids(tokens)
    first = driver.job(base, answer)
    driver.run()
    _, first_launch = asked(driver, np.concatenate((base, driver.ids(new))))  # of its size of step
    again, again_launch = asked(driver, np.concatenate((base, driver.ids(new))))
    said = np.array(first.ids, np.int32)
    turn, turn_launch = asked(driver, np.concatenate((base, said, driver.ids(new))))
    return {
        "tokens": tokens,
        "ttft_ms": 1e3 * first.ttft,
        "tokens_s": tokens / first.ttft,
        "decode_ms": 1e3 * float(median(np.diff(first.times))),
        "again_ms": 1e3 * again.ttft,
        "first_launch_ms": first_launch,
        "again_launch_ms": again_launch,
        "again_not_cached": len(base) + new - (again.cached or 0),
        "turn_ms": 1e3 * turn.ttft,
        "turn_launch_ms": turn_launch,
        "turn_not_cached": len(base) + answer + new - (turn.cached or 0),
    }


def beside(driver: Driver, tokens: int, rows: int = 8, context: int = 4000) -> dict[str, Any]:
    """Gaps between the tokens of `rows` decodes, alone and while a prompt of `tokens` tokens is read, how fast it is read then, and the busy
    time of a step at the beginning of another prompt."""
    jobs = [driver.job(driver.ids(context), 100_000) for _ in range(rows)]
    driver.run(until=lambda: all(len(job.times) > driver.steps for job in jobs))
    alone = np.concatenate([np.diff(job.times[min(10, driver.steps // 2) :]) for job in jobs])
    marks = [len(job.times) - 1 for job in jobs]
    long = driver.job(driver.ids(tokens))
    driver.run(until=lambda: long.times)
    gaps = np.concatenate([np.diff(job.times[mark:]) for job, mark in zip(jobs, marks, strict=True)])
    driver.job(driver.ids(tokens))
    for _ in range(PROFILED):
        driver.engine.step()
    busy = driver.busy(min(PROFILED, driver.steps))
    driver.clear()
    found = {
        "tokens": tokens, "rows": rows, "context": context, **busy,
        "alone_ms": 1e3 * float(np.median(alone)), "alone_p99_ms": 1e3 * float(np.percentile(alone, 99)),
        "ttft_s": long.ttft, "tokens_s": tokens / long.ttft,
    }  # fmt: skip
    if len(gaps):
        found |= {
            "during_ms": 1e3 * float(np.median(gaps)), "during_p99_ms": 1e3 * float(np.percentile(gaps, 99)),
            "during_max_ms": 1e3 * float(gaps.max()),
        }  # fmt: skip
    return found
