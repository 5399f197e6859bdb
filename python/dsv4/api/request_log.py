"""One line in the log for every request, when it has ended, however it ended.

Never anything that a client wrote, but for its id and the path without its query.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4.api.logs import FIELDS

if TYPE_CHECKING:
    from dsv4.api.metrics import Metrics

log = logging.getLogger("dsv4.request")

CLIENT_GONE = 499
"""The status of a request whose client went away before it had one; nginx's, as HTTP has none."""

LONGEST = 200
"""Characters of a path in the log."""

OTHER = "other"
"""The route of a request for which there is no endpoint."""

PROBES = frozenset({"/health", "/metrics"})
"""Answered on connections over the limit as well."""

QUIET = PROBES | {"/stats"}
"""Logged at `debug`, as they come every few seconds."""


def new_request_id() -> str:
    return uuid.uuid4().hex


@dataclass(slots=True)
class Record:
    """A request on its way. Whoever learns something of it writes it here."""

    request_id: str
    method: str
    path: str
    """As it was sent, without the query."""
    client: str
    tenant: str = ""
    """Of a key; never what a request says of itself."""
    route: str = OTHER
    """The path of its endpoint: one of few, where `path` may be anything."""
    arrived: float = field(default_factory=time.monotonic)
    status: int = 0
    """0 until an answer begins."""
    reason: str = ""
    """Why its generations finished, or the code of an error."""
    generations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    explanation: dict[str, Any] | None = None
    """What of its prompt was reused, and why not more: of its last one, where it had several."""
    first: float = 0.0
    last: float = 0.0
    """Times of the first and the last token."""

    def finished(self, reason: str) -> None:
        """A generation has ended; different reasons of several are all told."""
        if reason not in self.reason.split(","):
            self.reason = f"{self.reason},{reason}" if self.reason else reason

    def end(self, metrics: Metrics | None) -> None:
        """Writes the line and counts the request."""
        seconds = time.monotonic() - self.arrived
        self.status = self.status or CLIENT_GONE
        if metrics is not None:
            metrics.request_ended(self.method, self.route, self.status, seconds)
        level = logging.DEBUG if self.path in QUIET else logging.INFO
        if log.isEnabledFor(level):
            fields = self.fields(seconds)
            log.log(level, "%s", _text(fields), extra={FIELDS: fields})

    def fields(self, seconds: float) -> dict[str, Any]:
        """What the line says, in its order."""
        said: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": _printable(self.path),
            "status": self.status,
            "reason": self.reason or None,
            "client": _printable(self.client),
        }
        if self.tenant:
            said["tenant"] = _printable(self.tenant)
        if self.generations:
            said |= {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
            }
        if self.first:
            said["ttft_s"] = round(self.first - self.arrived, 4)
        said["duration_s"] = round(seconds, 4)
        if (later := self.output_tokens - self.generations) > 0 and self.last > self.first:
            said["tokens_per_s"] = round(later / (self.last - self.first), 2)
        return said


def _text(fields: dict[str, Any]) -> str:
    head = " ".join(str(fields[k]) for k in ("request_id", "method", "path", "status"))
    rest = (f"{k}={v}" for k, v in list(fields.items())[4:] if v is not None)
    return f"{head} {' '.join(rest)}"


def _printable(text: str) -> str:
    shown = "".join(c if c.isprintable() and c != " " else f"%{ord(c):02X}" for c in text[:LONGEST])
    return shown if len(text) <= LONGEST else f"{shown}…"
