"""The last requests that generated, and what each reused of the cache. Numbers and ids, never a text."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from dsv4.api.request_log import Record

SHOWN = 20
"""In the live view."""

KEPT = 1024
"""That can be looked up by their ids."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A request that has ended."""

    ended: float
    record: Record

    def shown(self, now: float) -> dict[str, Any]:
        """As JSON. Counts are tokens; `reason`: why not more was reused (see `Core.explain`)."""
        r, why = self.record, self.record.explanation or {}
        return {
            "id": r.request_id,
            "age_s": round(now - self.ended, 1),
            "prompt_tokens": r.prompt_tokens,
            "cached_tokens": r.cached_tokens,
            "output_tokens": r.output_tokens,
            "history_matched": why.get("history_matched", 0),
            "resumed_at": why.get("resumed_at", 0),
            "replayed": why.get("replayed", 0),
            "reason": why.get("reason", "none"),
            "first_s": round(r.first - r.arrived, 4) if r.first else None,
            "total_s": round(self.ended - r.arrived, 4),
            "finish": r.reason or None,
        }


class Recent:
    """The newest `KEPT` of them."""

    def __init__(self) -> None:
        self._hits: deque[Hit] = deque(maxlen=KEPT)

    def add(self, record: Record) -> None:
        """A request that has ended; only one that knows what it reused counts."""
        if record.explanation is not None:
            self._hits.append(Hit(time.monotonic(), record))

    def shown(self) -> list[dict[str, Any]]:
        """The newest first."""
        now = time.monotonic()
        return [hit.shown(now) for hit in itertools.islice(reversed(self._hits), SHOWN)]

    def find(self, request_id: str) -> dict[str, Any] | None:
        """The last one of an id, as the client or the server gave it; None where it is not kept."""
        now = time.monotonic()
        return next(
            (hit.shown(now) for hit in reversed(self._hits) if hit.record.request_id == request_id), None
        )
