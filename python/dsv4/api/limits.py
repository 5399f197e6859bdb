"""What a tenant uses, and when that is more than it may: requests and tokens a minute, and requests at a time.

A bucket holds a minute's worth and fills steadily. A request needs room for its prompt, or a full bucket where the prompt is more than
a bucket holds; what comes of its answer may leave a debt, which is worked off before the next request. Tokens from the cache are given back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

from dsv4.api.keys import Tenant
from dsv4.errors import RequestError
from dsv4.quantities import counted, nearest_number, numbered
from dsv4.sampling import SamplingParams

Clock = Callable[[], float]

MINUTE = 60.0


class Bucket:
    """So many a minute."""

    __slots__ = ("_clock", "_level", "_time", "most")

    def __init__(self, most: int, clock: Clock) -> None:
        self.most, self._clock = most, clock
        self._level, self._time = float(most), clock()

    @property
    def level(self) -> float:
        """What may be taken now; below 0 it is a debt."""
        now = self._clock()
        self._level = min(self._level + (now - self._time) * self.most / MINUTE, self.most)
        self._time = now
        return self._level

    def take(self, count: float) -> None:
        """Takes what was used already; a negative count gives back."""
        self._level = min(self.level - count, self.most)

    def wait(self, count: float) -> float:
        """Seconds until so much can be taken, or the bucket is full; 0 where it can be now."""
        lacking = min(count, self.most) - self.level
        # A refill may end a rounding short of what was waited for.
        return max(lacking * MINUTE / self.most, 0.0) if lacking > 1e-6 else 0.0

    def resized(self, most: int) -> Bucket:
        """With another limit, and what was used of the last minute."""
        made = Bucket(most, self._clock)
        made.take(self.most - self.level)
        return made


class Meter:
    """What one tenant uses. Only the event loop's thread touches it."""

    def __init__(self, tenant: Tenant, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.running = 0
        self.refused = {"requests": 0, "tokens": 0, "concurrent": 0}
        """Since the start, by what there was too much of."""
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(tenant)

    def change(self, tenant: Tenant) -> None:
        """Other limits hold from now on."""
        self.tenant = tenant
        self._requests = self._bucket(self._requests, tenant.requests_per_minute)
        self._tokens = self._bucket(self._tokens, tenant.tokens_per_minute)

    def _bucket(self, old: Bucket | None, most: int | None) -> Bucket | None:
        if most is None:
            return None
        if old is None:
            return Bucket(most, self._clock)
        return old if old.most == most else old.resized(most)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request from here to its end. Raises RequestError (429) where there are too many."""
        most = self.tenant.max_concurrent
        if most is not None and self.running >= most:
            raise self._too_much("concurrent", f"runs {counted(most, 'request')}, which is its limit", 1.0)
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None and (wait := bucket.wait(1)):
                raise self._too_much(what, f"has had its {bucket.most} {what} a minute", wait)
        if self._requests is not None:
            self._requests.take(1)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def admit(self, prompt: int, params: SamplingParams, *, refuse: bool) -> SamplingParams:
        """The parameters of a generation within the limits on one request; `refuse`: a `max_tokens` beyond them is no longer cut. Takes
        its prompt's tokens. Raises RequestError (400, 429)."""
        tenant, most = self.tenant, self.tenant.max_tokens
        if tenant.max_prompt_tokens is not None and prompt > tenant.max_prompt_tokens:
            text = f"prompt has {numbered(prompt, 'token')}; tenant {tenant.name!r} may send {tenant.max_prompt_tokens}"
            raise RequestError(text, "prompt", "context_length_exceeded", 400)
        if most is not None and (params.max_tokens is None or params.max_tokens > most):
            name = "max_tokens" if refuse and params.max_tokens is not None else "min_tokens"
            if name == "max_tokens" or params.min_tokens > most:
                given = getattr(params, name)
                text = f"{name} is {given}; tenant {tenant.name!r} may have up to {most}{nearest_number(given, 0, most)}"
                raise RequestError(text, name, "invalid_value", 400)
            params = dataclasses.replace(params, max_tokens=most)
        if self._tokens is not None and (wait := self._tokens.wait(prompt)):
            left = max(int(self._tokens.level), 0)
            text = f"has {numbered(left, 'token')} left of {self._tokens.most} a minute, and the prompt has {prompt}"
            raise self._too_much("tokens", text, wait)
        self.take(prompt)
        return params

    def take(self, tokens: int) -> None:
        """Counts tokens; a negative number gives back."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def shown(self) -> dict[str, object]:
        """As JSON: limits, and what is used of them."""
        limits = {f.name: getattr(self.tenant, f.name) for f in dataclasses.fields(Tenant) if f.metadata}
        left = {
            name: None if bucket is None else math.floor(bucket.level)
            for name, bucket in (("requests", self._requests), ("tokens", self._tokens))
        }
        return {"limits": limits, "left": left, "running": self.running, "refused": self.refused}

    def headers(self, *, anthropic: bool) -> list[tuple[bytes, bytes]]:
        """What is left, as OpenAI's or Anthropic's clients read it."""
        found: list[tuple[bytes, bytes]] = []
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is None:
                continue
            left, full = max(math.floor(bucket.level), 0), bucket.wait(bucket.most)
            if anthropic:
                head = f"anthropic-ratelimit-{name}"
                until = datetime.fromtimestamp(time.time() + full, timezone.utc).strftime(
                    "%Y-%m-%dT%H:%M:%SZ"
                )
                said = ((f"{head}-limit", bucket.most), (f"{head}-remaining", left), (f"{head}-reset", until))
            else:
                said = (
                    (f"x-ratelimit-limit-{name}", bucket.most),
                    (f"x-ratelimit-remaining-{name}", left),
                    (f"x-ratelimit-reset-{name}", span(full)),
                )
            found += [(key.encode(), str(value).encode()) for key, value in said]
        return found

    def _too_much(self, what: str, text: str, wait: float) -> RequestError:
        self.refused[what] += 1
        message = f"tenant {self.tenant.name!r} {text}; try again in {span(wait)}"
        return RequestError(message, None, "rate_limit_exceeded", 429, retry_after=wait)


def span(seconds: float) -> str:
    """`0s`, `120ms`, `3s`, `1m30s`, rounded up: as OpenAI says how long, and as its clients read it."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
