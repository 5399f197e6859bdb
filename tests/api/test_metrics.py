"""`/metrics`: every series from the start, counters that never fall, the names that dashboards ask for."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from dsv4.api.metrics import ALIASES, CORE, OBSERVED, Metrics
from dsv4.config import EngineConfig
from dsv4.engine.async_engine import AsyncEngine
from dsv4.text.tokenizer import Tokenizer
from prometheus_client.parser import text_string_to_metric_families

from tests.api.test_disconnect import request_bytes, wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.scripted import scripted
from tests.support.serving import RunningServer, running
from tests.test_core_border import make_core

Series = dict[tuple[str, frozenset], float]
COMPLETION = {"model": "default", "prompt": "Hi", "max_tokens": 4}

DASHBOARDS = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:iteration_tokens_total_bucket",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:request_prefill_kv_computed_tokens_bucket",
    "vllm:cache_config_info",
]
OURS = [
    "dsv4_requests_total",
    "dsv4_prompt_tokens_total",
    "dsv4_cached_prompt_tokens_total",
    "dsv4_generation_tokens_total",
    "dsv4_request_prompt_tokens_bucket",
    "dsv4_request_generation_tokens_bucket",
    "dsv4_time_to_first_token_seconds_bucket",
    "dsv4_inter_token_seconds_bucket",
    "dsv4_request_seconds_bucket",
    "dsv4_core_pages",
    "dsv4_core_pinned_pages",
]
OF_THE_PROCESS = [
    "http_requests_total",
    "http_request_duration_seconds_bucket",
    "dsv4_http_responses_total",
    "dsv4_client_disconnects_total",
    "dsv4_connections",
    "dsv4_connections_limit",
    "dsv4_connections_refused_total",
    "dsv4_build_info",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
    "process_cpu_seconds_total",
    "process_start_time_seconds",
    "dsv4_engine_restarts_total",
    "dsv4_engine_process_resident_memory_bytes",
    "dsv4_engine_process_cpu_seconds",
]


def parsed(text: str) -> tuple[Series, set[str]]:
    """Values by series, and the names of those that must not fall."""
    values: Series = {}
    growing: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert len(family.documentation) > 10, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in values, f"{key} is there twice"
            values[key] = sample.value
            if family.type in ("counter", "histogram"):
                growing.add(sample.name)
    return values, growing


def scrape(server: RunningServer) -> tuple[Series, set[str]]:
    return parsed(httpx.get(server.url + "/metrics").text)


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def test_every_name_that_dashboards_ask_for(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), name="m") as server:
        series, growing = scrape(server)
    labels = {name: dict(found) for name, found in series}
    for name in DASHBOARDS + OURS:
        assert labels[name]["model_name"] == "m", name
    for name in OF_THE_PROCESS:
        assert name in labels
    assert not any(name.endswith("_created") for name in labels)
    assert {name for name in labels if name.endswith(("_total", "_count", "_bucket", "_sum"))} <= growing
    reasons = {
        dict(found)["finished_reason"] for name, found in series if name == "vllm:request_success_total"
    }
    assert reasons == {"stop", "length", "abort", "error"}
    names = [n for spec in OBSERVED for n in spec.names] + [alias[0] for alias in ALIASES]
    assert len(names) == len(set(names))


def raw(server: RunningServer, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(data)
        with contextlib.suppress(OSError):
            s.recv(65536)


def everything(server: RunningServer) -> Iterator[Callable[[], Any]]:
    """Requests that end in every way there is."""
    post = lambda path, body, **k: httpx.post(server.url + path, json=body, **k)  # noqa: E731
    engine: FakeEngine = server.engine

    def fail() -> None:
        engine.fail_after = 2
        post("/v1/completions", COMPLETION)
        engine.fail_after = None

    def leave() -> None:
        engine.step_seconds = 0.02
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(request_bytes())
            wait_until(lambda: engine.live > 0)
        wait_until(lambda: engine.live == 0)
        engine.step_seconds = 0.0

    yield lambda: post("/v1/completions", COMPLETION)
    yield lambda: post("/v1/completions", {**COMPLETION, "n": 3, "stream": True})
    yield lambda: post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    yield lambda: post("/v1/prefixes", {"prompt": "Hi there"})
    yield lambda: httpx.delete(server.url + "/v1/prefixes/pin-1")
    yield lambda: httpx.delete(server.url + "/v1/sessions/some-key")
    yield lambda: post("/v1/completions", {"model": "other"})
    yield lambda: post("/v1/completions", COMPLETION, headers={"x-dsv4-tenant": "someone"})
    yield fail
    yield leave
    yield lambda: [httpx.get(f"{server.url}/scan/{i}") for i in range(5)]
    yield lambda: [httpx.request(m, server.url + "/health") for m in ("PUT", "HEAD", "OPTIONS", "TRACE")]
    yield lambda: raw(server, b"BREW /coffee HTCPCP/1.0\r\n\r\n")
    yield lambda: raw(server, b"PROPFIND /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    yield lambda: raw(server, b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n")
    yield lambda: post("/tokenize", {"prompt": "x" * 20_000})  # 413


def test_no_series_is_late_and_no_counter_falls(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    with running(engine, name="m", max_body_bytes=10_000) as server:
        start, growing = scrape(server)
        before = start
        for act in everything(server):
            act()
            after, _ = scrape(server)
            assert after.keys() == start.keys(), after.keys() ^ start.keys()
            fallen = [key for key in after if key[0] in growing and after[key] < before[key]]
            assert not fallen
            before = after
    end = before
    grown = {name for name, _ in start if any(end[k] > start[k] for k in start if k[0] == name)}
    for name in ("dsv4_client_disconnects_total", "http_requests_total", "dsv4_requests_total"):
        assert name in grown
    assert value(end, "vllm:request_success_total", model_name="m", finished_reason="error") == 1
    assert value(end, "vllm:request_success_total", model_name="m", finished_reason="abort") == 1
    assert value(end, "dsv4_http_responses_total", path="/v1/completions", status="404") == 1
    assert value(end, "dsv4_http_responses_total", path="other", status="404") == 5
    assert value(end, "http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 3
    assert value(end, "http_requests_total", handler="/v1/models", method="other", status="4xx") == 1


def test_what_is_counted_of_a_generation(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    engine.cached_tokens = 1
    with running(engine, name="m") as server:
        httpx.post(server.url + "/v1/completions", json=COMPLETION)
        httpx.post(server.url + "/v1/completions", json=COMPLETION | {"n": 2, "max_tokens": 2})
        series, _ = scrape(server)
    prompt = len(engine.seen[0].prompt)

    def of(name: str, **labels: str) -> float:
        return value(series, name, model_name="m", **labels)

    for prefix in ("dsv4_", "vllm:"):
        assert of(prefix + "generation_tokens_total") == 4 + 2 * 2
        assert of(prefix + "prompt_tokens_total") == 3 * prompt
        assert of(prefix + "request_prompt_tokens_sum") == 3 * prompt
        assert of(prefix + "request_generation_tokens_count") == 3
        assert of(prefix + "time_to_first_token_seconds_count") == 3
    assert of("dsv4_requests_total", finish_reason="length") == 3
    assert of("vllm:request_success_total", finished_reason="length") == 3
    assert of("dsv4_cached_prompt_tokens_total") == 3
    assert of("vllm:request_prefill_kv_computed_tokens_sum") == 3 * (prompt - 1)
    for name in ("dsv4_inter_token_seconds", "vllm:inter_token_latency_seconds"):
        assert of(name + "_count") == 3 + 2 * 1
    for name in ("queue", "prefill", "decode", "inference"):
        assert of(f"vllm:request_{name}_time_seconds_count") == 3
    assert of("vllm:e2e_request_latency_seconds_count") == 3


def test_steps_are_counted_by_tokens_and_time() -> None:
    """By a real core: a step has the prompt, further ones a token each; the device takes 3 ms for each."""
    with scripted(step=0.003):
        engine = AsyncEngine.from_config(EngineConfig(num_pages=64, block_size=128, max_num_seqs=2))
        with running(engine, name="m") as server:
            asked = {"prompt": list(range(40, 60)), "max_tokens": 6, "ignore_eos": True}
            assert httpx.post(server.url + "/v1/completions", json=asked).status_code == 200
            series, _ = scrape(server)
    steps = value(series, "dsv4_core_steps_total", model_name="m")

    def of(name: str, **labels: str) -> float:
        return value(series, name, model_name="m", **labels)

    assert of("vllm:iteration_tokens_total_sum") == 20 + 5
    for name in ("vllm:iteration_tokens_total", "dsv4_step_duration_seconds"):
        assert of(name + "_count") == of(name + "_bucket", le="+Inf") == steps >= 6
    assert of("vllm:iteration_tokens_total_bucket", le="1.0") >= 5
    assert of("vllm:iteration_tokens_total_bucket", le="32.0") == steps
    assert of("dsv4_step_duration_seconds_bucket", le="0.002") == 0
    assert of("dsv4_step_duration_seconds_bucket", le="0.005") == steps
    assert of("dsv4_step_duration_seconds_sum") == pytest.approx(0.003 * steps)


@pytest.mark.parametrize(
    ("stats", "used"),
    [
        (
            {"pages": 2112, "free_pages": 2093, "cached_pages": 15, "available_pages": 2093},
            19 / 2112,
        ),  # pinned
        (
            {"pages": 2112, "free_pages": 2093, "cached_pages": 15, "available_pages": 2112},
            0.0,
        ),  # can be evicted
        ({"pages": 100, "free_pages": 0, "cached_pages": 0, "available_pages": 0}, 1.0),
        ({}, 0.0),
    ],
)
def test_the_usage_of_the_cache_counts_what_cannot_be_evicted(stats: dict[str, int], used: float) -> None:
    series, _ = parsed(Metrics(lambda: stats, "m").render().decode())
    assert value(series, "vllm:kv_cache_usage_perc", model_name="m") == pytest.approx(used)


def test_every_statistic_of_the_core_has_a_help_and_a_kind() -> None:
    stats = make_core().stats()
    assert {name for name in stats if not name.startswith("lost_")} == set(CORE)
    series, growing = parsed(Metrics(lambda: stats, "m").render().decode())
    assert "dsv4_core_steps_total" in growing and "dsv4_core_pinned_pages" not in growing
    assert value(series, "dsv4_core_pages", model_name="m") == stats["pages"]
