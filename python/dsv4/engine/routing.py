"""Who asks, how urgent it is, and what its prefix is worth later: everything about a request but its tokens and how they
are sampled. Nothing here changes what is generated."""

from __future__ import annotations

import hashlib
import time
import zlib
from dataclasses import dataclass
from typing import Any

from dsv4.errors import ConfigError, show
from dsv4.quantities import parse_bytes
from dsv4.sampling import is_number, is_unicode, is_whole

_TEXTS = ("salt", "tenant", "session")
_WHOLE = {"priority": (-(2**31), 2**31 - 1), "retention": (-100, 100)}
_SPANS = {"deadline_ms": 1e9, "ttl": 1e9}
"""The most of each, in its unit."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The hints of one request. Raises ValueError with one line naming field, value and limit."""

    salt: str = ""
    """Prefixes are shared only between requests of an equal salt."""
    priority: int = 0
    """Higher goes first, and may take the slab of a lower one, whose state is kept."""
    tenant: str = ""
    """Whose share of the prefill it uses; the empty name is a tenant like any other."""
    deadline_ms: float | None = None
    """Milliseconds from now until the first token is wanted."""
    session: str | None = None
    """Requests with an equal key continue each other."""
    ttl: float | None = None
    """Seconds that its prefix is to be kept after its last use."""
    retention: int = 0
    """Higher goes later when memory is short."""

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if value is None and name == "session":
                continue
            if not isinstance(value, str) or not is_unicode(value):
                raise ValueError(f"{name} is {show(value)}; it must be Unicode text")
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if not is_whole(value) or not low <= value <= high:
                raise ValueError(f"{name} is {show(value)}; it must be a whole number from {low} to {high}")
            object.__setattr__(self, name, int(value))
        for name, most in _SPANS.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= most):
                raise ValueError(f"{name} is {show(value)}; it must be a number from 0 to {most:g}")
            object.__setattr__(self, name, None if value is None else float(value))

    def core(self, tenants: Tenants, now_us: int) -> dict[str, Any]:
        """As keywords of `Core.submit`."""
        return {
            "salt": self.salt.encode(),
            "priority": self.priority,
            "tenant": tenants.id_of(self.tenant),
            "deadline_us": None if self.deadline_ms is None else now_us + int(1000 * self.deadline_ms),
            "session": None if self.session is None else session_id(self.session),
            "ttl_us": None if self.ttl is None else int(1e6 * self.ttl),
            "retention": self.retention,
        }


PLAIN = Routing()
"""No hints."""


def now_us() -> int:
    """The clock of `Core.set_time`: microseconds, monotonic."""
    return time.monotonic_ns() // 1000


def session_id(key: str) -> int:
    """The core's number of a session."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class Tenants:
    """The tenants of `--tenants NAME:WEIGHT[:QUOTA],...` and the core's numbers of all names.

    Named ones are numbered from 1; any other name gets a number from its checksum, so no table grows with what clients
    send.
    """

    def __init__(self, text: str | None = None) -> None:
        """Raises ConfigError naming the part that cannot be read."""
        self.named: dict[str, tuple[float, int | None]] = {}
        for part in (text or "").split(","):
            if not part.strip():
                continue
            name, *numbers = (p.strip() for p in part.strip().split(":"))
            try:
                weight = float(numbers[0])
                quota = parse_bytes(numbers[1]) if len(numbers) > 1 else None
                if not name or len(numbers) > 2 or not 0 < weight < float("inf"):
                    raise ValueError
            except (IndexError, ValueError):
                raise ConfigError(
                    f"tenants has {part.strip()!r}; write NAME:WEIGHT or NAME:WEIGHT:QUOTA with a weight above 0 and a "
                    "quota such as 2GiB"
                ) from None
            if name in self.named:
                raise ConfigError(f"tenants has {name!r} twice; each name may be there once")
            self.named[name] = (weight, quota)
        self._ids = {name: i + 1 for i, name in enumerate(self.named)}

    def id_of(self, name: str) -> int:
        """The core's number of a tenant; 0 for the empty name."""
        if not name:
            return 0
        return self._ids.get(name) or 2**31 + zlib.crc32(name.encode()) // 2

    def names(self) -> dict[int, str]:
        """Names of the numbers that are configured, and of 0."""
        return {0: "", **{i: name for name, i in self._ids.items()}}

    def core(self, page_bytes: int) -> list[dict[str, Any]]:
        """As `tenants` of `Core`: quotas in pages."""
        return [
            {
                "id": self._ids[name],
                "weight": weight,
                "quota_pages": None if quota is None else quota // page_bytes,
            }
            for name, (weight, quota) in self.named.items()
        ]
