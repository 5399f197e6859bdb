"""Counts a generation in the metrics, and in the record of its request."""

from __future__ import annotations

import time

from dsv4.api.limits import Meter
from dsv4.api.metrics import Metrics
from dsv4.api.request_log import Record
from dsv4.engine.request import RequestOutput, Timing
from dsv4.sampling import SamplingParams


class Generation:
    """Observes one generation: `step` for each output, `close` at the end, whether it has finished or not."""

    __slots__ = (
        "again",
        "arrived",
        "cached",
        "done",
        "first",
        "last",
        "meter",
        "metrics",
        "prompt",
        "record",
        "tokens",
    )

    def __init__(
        self,
        metrics: Metrics,
        record: Record,
        meter: Meter,
        prompt: int,
        params: SamplingParams,
        *,
        again: bool,
    ) -> None:
        """`prompt`: its tokens, which the meter has taken. `again`: another generation of the same request has the same prompt."""
        self.metrics, self.record, self.meter, self.prompt = metrics, record, meter, prompt
        self.arrived = record.arrived
        self.first = self.last = 0.0
        self.tokens, self.done, self.again = 0, False, again
        self.cached: int | None = None
        record.generations += 1
        record.prompt_tokens += 0 if again else prompt
        if params.max_tokens is not None:
            metrics.max_tokens.observe(params.max_tokens)

    def step(self, output: RequestOutput) -> None:
        now, count = time.monotonic(), len(output.token_ids)
        if output.started is not None:
            self._cached(output.started.cached_tokens)
        if count:
            self._tokens(now, count)
        if output.finished:
            self.done = True
            self._finish(now, output)

    def refused(self) -> None:
        """It was not taken, or has ended with an error."""
        if not self.done and not self.first and not self.again:
            self.meter.take(-(self.prompt - (self.cached or 0)))
        self.done = True

    def close(self) -> None:
        """A generation that nobody waits for any more was aborted."""
        if not self.done:
            self.metrics.finished.labels("abort").inc()

    def _cached(self, tokens: int) -> None:
        self.cached = tokens
        if not self.again:
            self.record.cached_tokens += tokens
            self.meter.take(-tokens)

    def _tokens(self, now: float, count: int) -> None:
        m = self.metrics
        if self.first:
            m.between_tokens.observe((now - self.last) / count)
        else:
            self.first = now
            m.first_token.observe(now - self.arrived)
            m.prompt_tokens.inc(self.prompt)
            m.prompt_length.observe(self.prompt)
            self.record.first = self.record.first or now
        self.last = self.record.last = now
        self.tokens += count
        self.meter.take(count)
        self.record.output_tokens += count
        m.output_tokens.inc(count)

    def _finish(self, now: float, output: RequestOutput) -> None:
        m, usage, reason = self.metrics, output.usage, output.finish_reason or "stop"
        self.record.finished(reason)
        m.finished.labels(reason).inc()
        m.whole_request.observe(now - self.arrived)
        m.output_length.observe(self.tokens)
        if self.tokens > 1:
            m.mean_between.observe((self.last - self.first) / (self.tokens - 1))
        if usage is None:
            return
        if not self.again:
            self.record.explanation = usage.explanation
        if self.cached is None:
            self._cached(usage.cached_tokens)
        m.cached_tokens.inc(usage.cached_tokens)
        m.computed_length.observe(usage.prompt_tokens - usage.cached_tokens)
        first = self.first or now
        timing = usage.timing or Timing(0.0, first - self.arrived, now - first)
        m.queued.observe(timing.queued)
        m.prefill.observe(timing.prefill)
        m.decode.observe(timing.decode)
        m.inference.observe(timing.prefill + timing.decode)
