"""What `/metrics` shows: counters of the HTTP side, and the engine's own at the moment of the scrape.

Names of our own begin with `dsv4_`. Gateways (llm-d, the Gateway API's endpoint picker) and autoscalers read
three names of vLLM; these are given as well, with the label they expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4.engine.request import RequestOutput, Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)

_LEVELS = {
    "pages", "free_pages", "cached_pages", "snapshot_pages", "deferred_pages", "slabs", "free_slabs",
    "waiting", "running", "snapshots", "in_flight", "available_pages", "parked", "step_predicted_us", "step_measured_us",
    "repeated_misses",
}  # fmt: skip
"""Engine statistics that go up and down; all others only grow."""


class Metrics:
    """Every series of one server. A registry of its own, so that several servers fit in one process."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        model: str,
        tenants: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
    ) -> None:
        """`stats`: the engine's counters; `model`: the value of the `model_name` label; `tenants`: what each was
        served."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, model, tenants))
        new: dict[str, Any] = {"registry": self.registry}
        self.responses = Counter("dsv4_http_responses", "HTTP responses", ("path", "status"), **new)
        self.disconnects = Counter(
            "dsv4_client_disconnects", "Requests whose client went away before the end", **new
        )
        self.finished = Counter("dsv4_requests", "Generations by how they ended", ("finish_reason",), **new)
        self.prompt_tokens = Counter("dsv4_prompt_tokens", "Prompt tokens of ended generations", **new)
        self.cached_tokens = Counter(
            "dsv4_cached_prompt_tokens", "Prompt tokens that were not computed again", **new
        )
        self.output_tokens = Counter("dsv4_generation_tokens", "Tokens generated", **new)
        self.prompt_length = Histogram("dsv4_request_prompt_tokens", "Prompt length", buckets=_TOKENS, **new)
        self.first_token = Histogram(
            "dsv4_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_SECONDS,
            **new,
        )
        self.between_tokens = Histogram(
            "dsv4_inter_token_seconds",
            "Between outputs of a stream, per token",
            buckets=_TOKEN_SECONDS,
            **new,
        )
        self.whole_request = Histogram(
            "dsv4_request_seconds", "From the request's arrival to its last token", buckets=_SECONDS, **new
        )

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class GenerationTimer:
    """Observes one generation: `step` for each output."""

    __slots__ = ("arrived", "last", "metrics")

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        """`arrived`: `time.monotonic()` when the request came in."""
        self.metrics, self.arrived, self.last = metrics, arrived, 0.0

    def step(self, output: RequestOutput) -> None:
        now, count = time.monotonic(), len(output.token_ids)
        if count:
            if not self.last:
                self.metrics.first_token.observe(now - self.arrived)
            else:
                self.metrics.between_tokens.observe((now - self.last) / count)
            self.last = now
            self.metrics.output_tokens.inc(count)
        if output.finished:
            self.metrics.finished.labels(output.finish_reason or "stop").inc()
            self.metrics.whole_request.observe(now - self.arrived)
            if output.usage is not None:
                self._usage(output.usage)

    def _usage(self, usage: Usage) -> None:
        self.metrics.prompt_tokens.inc(usage.prompt_tokens)
        self.metrics.prompt_length.observe(usage.prompt_tokens)
        self.metrics.cached_tokens.inc(usage.cached_tokens)


class _EngineCollector(Collector):
    """The engine's statistics, read when scraped."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        model: str,
        tenants: Callable[[], Mapping[str, Mapping[str, float]]],
    ) -> None:
        self.stats, self.model, self.tenants = stats, model, tenants

    def describe(self) -> Iterable[Metric]:
        return ()  # the names follow from the statistics; registering must not ask the engine

    def collect(self) -> Iterable[Metric]:
        stats = self.stats()
        for name, value in stats.items():
            family = GaugeMetricFamily if name in _LEVELS else CounterMetricFamily
            yield family(f"dsv4_core_{name}", f"Core.stats()[{name!r}]", value=value)
        for name, family, help in (
            ("tokens", CounterMetricFamily, "Tokens computed for a tenant: prompts and outputs"),
            ("prefill_us", CounterMetricFamily, "Predicted prefill time of a tenant, in microseconds"),
            ("live", GaugeMetricFamily, "Live requests of a tenant"),
        ):
            series = family(f"dsv4_tenant_{name}", help, labels=("tenant",))
            for tenant, counts in self.tenants().items():
                series.add_metric((tenant,), counts[name])
            yield series
        pages = stats.get("pages", 0)
        used = 1 - (stats.get("free_pages", 0) + stats.get("cached_pages", 0)) / pages if pages else 0.0
        for name, help, value in (
            ("vllm:num_requests_running", "Requests being computed", stats.get("running", 0)),
            ("vllm:num_requests_waiting", "Requests waiting", stats.get("waiting", 0)),
            (
                "vllm:kv_cache_usage_perc",
                "Share of pages that neither are free nor could be evicted",
                max(used, 0.0),
            ),
        ):
            gauge = GaugeMetricFamily(name, help, labels=("model_name",))
            gauge.add_metric((self.model,), value)
            yield gauge
