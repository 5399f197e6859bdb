"""Medians of times, the workloads of the Rust half in numpy, and results as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

BLOCK, CHUNK, MILLION = 256, 8192, 1 << 20
TRACE_BLOCK, VOCABULARY = 512, 129_280
CAPACITIES = {"4096 blocks": 4096, "16384 blocks": 16_384, "65536 blocks": 65_536, "unlimited": 600_000}


def us(f: Callable[[], Any]) -> float:
    """Microseconds that `f` takes."""
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e6


def report_us(bench: str, case: str, system: str, runs: int, f: Callable[[], float], **more: Any) -> None:
    """Prints the median and the lowest of `runs` times that `f` measures."""
    times = sorted(f() for _ in range(runs))
    report(bench, case, system, us=round(times[runs // 2], 3), low_us=round(times[0], 3), **more)


def report(bench: str, case: str, system: str, **numbers: Any) -> None:
    """Prints one result."""
    print(json.dumps({"bench": bench, "case": case, "system": system, **numbers}), flush=True)


def tokens(seed: int, n: int) -> np.ndarray:
    """uint32 [n]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, n, dtype=np.uint32)


def diverging(prompt: np.ndarray) -> np.ndarray:
    """Another token in the middle."""
    other = prompt.copy()
    other[len(other) // 2] ^= 1
    return other


def compare(prompt: np.ndarray) -> None:
    """The floor in this process: a memory compare of the same tokens."""
    twin = prompt.tobytes()
    mine = prompt.tobytes()
    report_us("radix_match_1m", "floor", "memcmp", 31, lambda: us(lambda: mine == twin))


@cache
def _piece(number: int) -> np.ndarray:
    return tokens(number + 1, TRACE_BLOCK)


def trace(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(time in microseconds, prompt uint32 [n]) of each request; equal ids are equal tokens."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = np.concatenate([_piece(i) for i in record["hash_ids"]])[: record["input_length"]]
        yield int(record["timestamp"] * 1000), prompt
