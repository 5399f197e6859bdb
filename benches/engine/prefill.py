"""Prompts: how fast they are read, cold and out of the cache, alone and beside running decodes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

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


class Asked(NamedTuple):
    """A request for one token when it is over."""

    job: Job
    launch_ms: float
    """From its submission until the host began to launch its first step: 0 where an engine does not tell."""
    launched_ms: float
    """Until it had (of an engine that waits for each step: until that was over)."""


def asked(driver: Driver, ids: np.ndarray) -> Asked:
    """Of this prompt."""
    job = driver.job(ids)
    driver.engine.step()
    times = (1e3 * max(0.0, at - job.begun) for at in (driver.engine.launching, time.perf_counter()))
    found = Asked(job, *times)
    driver.run()
    return found


def first(driver: Driver, tokens: int) -> dict[str, Any]:
    """Milliseconds to the answer of the first request after a start, and of another like it: more than a little apart, something was not ready."""
    one, other = (asked(driver, driver.ids(tokens)) for _ in range(2))
    return {"tokens": tokens, "first_ms": 1e3 * one.job.ttft, "second_ms": 1e3 * other.job.ttft}


def cached(driver: Driver, tokens: int, new: int) -> dict[str, Any]:
    """A prompt whose first `tokens` tokens were read before and whose last `new` were not: median times to its first launch, to the end of that, and to
    its token of up to five."""
    base = driver.ids(tokens)
    driver.job(base)
    driver.run()
    found = [asked(driver, np.concatenate((base, driver.ids(new)))) for _ in range(1 + min(5, driver.steps))]
    return {
        "tokens": tokens,
        "new": new,
        "ttft_ms": median(1e3 * f.job.ttft for f in found[1:]),
        "launch_ms": median(f.launch_ms for f in found[1:]),
        "launched_ms": median(f.launched_ms for f in found[1:]),
        "not_cached": tokens + new - (found[-1].job.cached or 0),
    }


def turns(
    driver: Driver, tokens: int, new: int = 64, answer: int = 40, rows: int = 8, behind: int = 32_768
) -> dict[str, Any]:
    """A prompt that nothing is known of, read once; decode steps of its answer; the same prompt again with `new` tokens behind it, twice; the
    conversation's next turn, which has the answer and `new` tokens; and `beside` for `rows` decodes and `behind` tokens behind the prompt."""
    base = driver.ids(tokens)
    first = driver.job(base, answer)
    driver.run()
    once, again = (asked(driver, np.concatenate((base, driver.ids(new)))) for _ in range(2))
    said = np.array(first.ids, np.int32)
    turn = asked(driver, np.concatenate((base, said, driver.ids(new))))
    last = beside(driver, behind, rows, min(4000, tokens // 2), base)
    return {
        "tokens": tokens,
        "ttft_ms": 1e3 * first.ttft,
        "tokens_s": tokens / first.ttft,
        "decode_ms": 1e3 * float(median(np.diff(first.times))),
        "once_ms": 1e3 * once.job.ttft,
        "again_ms": 1e3 * again.job.ttft,
        "again_launch_ms": again.launch_ms,
        "again_launched_ms": again.launched_ms,
        "again_not_cached": len(base) + new - (again.job.cached or 0),
        "turn_ms": 1e3 * turn.job.ttft,
        "turn_launch_ms": turn.launch_ms,
        "turn_launched_ms": turn.launched_ms,
        "turn_not_cached": len(base) + answer + new - (turn.job.cached or 0),
        **{f"behind_{name}": value for name, value in last.items()},
    }


def beside(
    driver: Driver, tokens: int, rows: int = 8, context: int = 4000, base: np.ndarray | None = None
) -> dict[str, Any]:
    """Gaps between the tokens of `rows` decodes, alone and while a prompt of `tokens` tokens is read, how fast it is read then, and the busy
    time of a step at the beginning of another prompt. They come behind the tokens `base`,
    which are in the cache."""

    def prompt() -> np.ndarray:
        ids = driver.ids(tokens)
        return ids if base is None else np.concatenate((base, ids))

    jobs = [driver.job(driver.ids(context), 100_000) for _ in range(rows)]
    driver.run(until=lambda: all(len(job.times) > driver.steps for job in jobs))
    alone = np.concatenate([np.diff(job.times[min(10, driver.steps // 2) :]) for job in jobs])
    marks = [len(job.times) - 1 for job in jobs]
    long = driver.job(prompt())
    driver.run(until=lambda: long.times)
    gaps = np.concatenate([np.diff(job.times[mark:]) for job, mark in zip(jobs, marks, strict=True)])
    driver.job(prompt())
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
