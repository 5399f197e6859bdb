"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from dsv4.api import tracing
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import running

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where to post, and what was posted."""
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *about: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        server.shutdown()
        thread.join()


def test_every_request_is_a_span(tokenizer: Tokenizer, collector: tuple[str, list[bytes]]) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, got = collector
    engine = FakeEngine(tokenizer=tokenizer)
    engine.cached_tokens = 1
    body = {"model": "default", "prompt": "xyzzy", "max_tokens": 3, "ignore_eos": True}
    with running(engine, otlp_traces_endpoint=endpoint) as server:
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        httpx.post(server.url + "/v1/completions", json=body, headers=headers)
        httpx.post(server.url + "/v1/completions", json=body | {"n": 0})
        httpx.get(server.url + "/health")
    spans = []
    for request in got:
        for resource in ExportTraceServiceRequest.FromString(request).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "dsv4"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    whole, refused = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert whole.name == "POST /v1/completions" and whole.trace_id.hex() == PARENT.split("-")[1]
    assert whole.parent_span_id.hex() == PARENT.split("-")[2]
    told = {a.key: a.value for a in whole.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert told["dsv4.usage.cached_tokens"].int_value == 1
    assert told["dsv4.request_id"].string_value == "mine"
    assert whole.start_time_unix_nano < whole.events[0].time_unix_nano <= whole.end_time_unix_nano
    assert {a.key: a.value.string_value for a in refused.attributes}["error.type"] == "invalid_value"
    assert b"xyzzy" not in b"".join(got)


def test_paths_without_a_route_are_one_name(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a fault of the library is a line of the log, not one of the request."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    told: list[tuple[str, str]] = []

    def start_span(name: str, **about: Any) -> Any:
        told.append((name, about["attributes"]["http.route"]))
        raise RuntimeError("out of spans")

    with running(
        FakeEngine(tokenizer=tokenizer), otlp_traces_endpoint="http://127.0.0.1:1/v1/traces", api_key="k"
    ) as server:
        monkeypatch.setattr(server.service.tracer._tracer, "start_span", start_span)
        key = {"x-api-key": "k"}
        for path, headers in (
            ("/a", key),
            ("/b/c", key),
            ("/b/c", {}),
            ("/v1/models", {}),
            ("/v1/models/tiny", key),
        ):
            assert httpx.get(server.url + path, headers=headers).status_code in (200, 401, 404)
    routes = ["other", "other", "other", "/v1/models", "/v1/models/{name:text}"]
    assert told == [(f"GET {route}", route) for route in routes]
    lines = [r.getMessage() for r in caplog.records if "RuntimeError: out of spans" in r.getMessage()]
    assert len(lines) == len(told) and not any(r.exc_info for r in caplog.records)


@pytest.mark.parametrize("endpoint", ["collector:4317", "", "ftp://x/y", "http://"])
def test_a_place_that_is_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint is"):
        tracing.check(endpoint)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.check(None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        tracing.check("http://127.0.0.1:4318/v1/traces")
