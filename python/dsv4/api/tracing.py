"""A span for every request that ends, to an OpenTelemetry collector: `--otlp-traces-endpoint`, with the extra `otel`.

Names of attributes are those of OpenTelemetry's conventions for HTTP servers and for generative models. A request that brings a
`traceparent` continues its trace. A thread of the library sends; what does not fit in its queue is dropped. No text of a request is in a span.
"""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Scope

import dsv4
from dsv4.api.http import header
from dsv4.api.request_log import QUIET, Record
from dsv4.errors import ConfigError

log = logging.getLogger("dsv4.api")

CARRIED = ("traceparent", "tracestate")
"""Headers by which a trace goes on."""


def check(endpoint: str | None) -> None:
    """Raises ConfigError where it is no URL to which traces are posted, or the library is not there. None is no tracing."""
    if endpoint is None:
        return
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise ConfigError(
            f"otlp_traces_endpoint is {endpoint!r}; it takes a URL such as http://127.0.0.1:4318/v1/traces"
        )
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            f"otlp_traces_endpoint needs OpenTelemetry ({e}): pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from None


class Tracer:
    """Makes spans of records."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint`: see `check`, which was asked."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = Resource.create({"service.name": "dsv4", "service.version": dsv4.__version__})
        self._provider, self._trace, self._model = TracerProvider(resource=about), trace, model
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("dsv4", dsv4.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: Record, scope: Scope) -> None:
        """A request has ended. What goes wrong in the library is a line of the log: the request is answered."""
        if record.path in QUIET:
            return
        try:
            self._tell(record, scope)
        except Exception as e:
            log.warning("no span of request %s: %s: %s", record.request_id, type(e).__name__, e)

    def _tell(self, record: Record, scope: Scope) -> None:
        end, now = time.time_ns(), time.monotonic()

        def at(moment: float) -> int:
            return end - int(1e9 * (now - moment))

        carrier = {name: header(scope, name.encode()) for name in CARRIED}
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract({k: v for k, v in carrier.items() if v}),
            kind=self._trace.SpanKind.SERVER,
            attributes=self._attributes(record),
            start_time=at(record.arrived),
        )
        if record.first:
            span.add_event("first token", timestamp=at(record.first))
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, record.reason)
        span.end(end)

    def _attributes(self, record: Record) -> dict[str, Any]:
        told: dict[str, Any] = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "dsv4.request_id": record.request_id,
        }
        if record.tenant:
            told["dsv4.tenant"] = record.tenant
        if record.status >= 400:
            told["error.type"] = record.reason or str(record.status)
        if record.generations:
            told |= {
                "gen_ai.operation.name": "chat",
                "gen_ai.response.model": self._model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.output_tokens,
                "gen_ai.response.finish_reasons": record.reason.split(","),
                "dsv4.usage.cached_tokens": record.cached_tokens,
            }
        return told

    def close(self) -> None:
        """Sends what is left."""
        try:
            self._provider.shutdown()
        except Exception as e:
            log.warning("the last spans may be lost: %s: %s", type(e).__name__, e)
