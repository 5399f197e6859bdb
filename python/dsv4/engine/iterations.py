"""How large steps were and how long they took, counted by size. Statistics of an engine, as they cross to the server's process: numbers
by name that never fall, so that those of several processes can be added."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

BOUNDS: Mapping[str, tuple[int, ...]] = {
    "step_tokens": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "step_us": (500, *(n * 10**e for e in (3, 4, 5) for n in (1, 2, 5)), *(n * 10**6 for n in (1, 2, 5, 10))),
}
"""Upper bounds of the buckets of each figure: tokens of prompts and decodes in a step (vLLM's buckets), and microseconds that the
device took for it."""


class Iterations:
    """Counts steps. Only the engine's thread touches it."""

    def __init__(self) -> None:
        self._counts = {name: [0] * (len(bounds) + 1) for name, bounds in BOUNDS.items()}
        self._sums = dict.fromkeys(BOUNDS, 0)

    def add(self, tokens: int, us: float) -> None:
        """A step that was committed."""
        for name, value in (("step_tokens", tokens), ("step_us", round(us))):
            self._counts[name][bisect_left(BOUNDS[name], value)] += 1
            self._sums[name] += value

    def stats(self) -> dict[str, int]:
        """`NAME_bucket_I`: steps in bucket I, the last of which has no bound; `NAME_sum`."""
        found = {f"{name}_sum": total for name, total in self._sums.items()}
        for name, counts in self._counts.items():
            found |= {f"{name}_bucket_{i}": count for i, count in enumerate(counts)}
        return found


def buckets(name: str, stats: Mapping[str, int]) -> tuple[list[tuple[float, int]], int]:
    """Of a figure: its buckets as (upper bound, steps up to it), and the sum of its values."""
    found, below = list[tuple[float, int]](), 0
    for i, bound in enumerate((*BOUNDS[name], float("inf"))):
        below += stats.get(f"{name}_bucket_{i}", 0)
        found.append((bound, below))
    return found, stats.get(f"{name}_sum", 0)
