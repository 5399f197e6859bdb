"""Counts of an engine over all of its processes: what one has counted is not lost with it."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4.engine.messages import Counts
from dsv4.engine.routing import Tenants

GAUGES = frozenset(
    [
        "pages",
        "free_pages",
        "available_pages",
        "cached_pages",
        "snapshot_pages",
        "deferred_pages",
        "pinned_pages",
        "slabs",
        "free_slabs",
        "waiting",
        "running",
        "parked",
        "in_flight",
        "snapshots",
        "page_bytes",
        "slab_bytes",
        "step_predicted_us",
        "step_measured_us",
        "step_budget_us",
    ]
)
"""Statistics of the core that tell what is now. All others count, and never fall."""


def is_gauge(name: str) -> bool:
    """Whether a statistic tells what is now; memory of a rank does (`rank_N_bytes`)."""
    return name in GAUGES or (name.startswith("rank_") and name.endswith("_bytes"))


_NOW_ZERO = ("running", "in_flight")
"""Gauges of an engine that is gone."""


class Tally:
    """The newest counts of the process that runs, added to those of the ones before. Any thread may ask."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._tenants_before: dict[int, dict[str, float]] = {}
        self._now = Counts({}, {})

    def update(self, counts: Counts) -> None:
        """What the process tells."""
        self._now = Counts(counts.stats, self._now.tenants if counts.tenants is None else counts.tenants)

    def begin_anew(self) -> None:
        """The process is gone; what it counted stays."""
        gauges = {k: 0 if k in _NOW_ZERO else v for k, v in self._now.stats.items() if is_gauge(k)}
        self._before = {k: v for k, v in self.stats().items() if not is_gauge(k)}
        self._tenants_before = {n: {**c, "live": 0} for n, c in self._tenants().items()}
        self._now = Counts({**gauges, **dict.fromkeys(self._before, 0)}, {})

    def stats(self) -> dict[str, int]:
        """See `Core.stats`."""
        return {k: v + self._before.get(k, 0) for k, v in self._now.stats.items()}

    def tenants(self, tenants: Tenants) -> dict[str, dict[str, float]]:
        """By name, what tenants were served (see `Core.tenants`); those that are not configured together as `other`."""
        names = tenants.names()
        served: dict[str, dict[str, float]] = {
            name: {"live": 0, "tokens": 0, "prefill_us": 0} for name in (*names.values(), "other")
        }
        for number, counts in self._tenants().items():
            _add(served[names.get(number, "other")], counts)
        return served

    def _tenants(self) -> dict[int, dict[str, float]]:
        summed = {n: dict(c) for n, c in self._tenants_before.items()}
        for number, counts in (self._now.tenants or {}).items():
            _add(summed.setdefault(number, {}), counts)
        return summed


def _add(into: dict[str, float], counts: Mapping[str, float]) -> None:
    for name, value in counts.items():
        into[name] = into.get(name, 0) + value
