"""One line in the log for every request, however it ends, and never what a client wrote."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from dsv4.api.logs import FIELDS
from dsv4.api.request_log import Record
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import request_bytes, wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

SECRET = "xyzzy-plugh"
BODY = {"model": "default", "prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}


class Lines:
    """What the request log has said."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "dsv4.request")
        self._caplog = caplog

    def all(self) -> list[dict[str, Any]]:
        records = [r for r in list(self._caplog.records) if r.name == "dsv4.request"]
        return [{**getattr(r, FIELDS), "level": r.levelname, "text": r.getMessage()} for r in records]

    def one(self) -> dict[str, Any]:
        """The only line since the last call."""
        wait_until(lambda: self.all())
        (line,) = self.all()
        said = [f"{r.getMessage()} {vars(r)}" for r in self._caplog.records if not r.name.startswith("httpx")]
        assert not any(SECRET in text for text in said), "the log holds what a client wrote"
        self._caplog.clear()
        return line


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


def send(server: RunningServer, data: bytes, *, answer: bool = True) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as s:
        s.sendall(data)
        if answer:
            s.recv(65536)


def post(path: str, body: Any, **how: Any) -> Callable[[RunningServer], Any]:
    return lambda server: httpx.post(server.url + path, json=body, timeout=30, **how)


ENDS: list[tuple[str, dict[str, Any], Callable[[RunningServer], Any], int, str | None]] = [
    ("whole", {}, post("/v1/completions", BODY), 200, "length"),
    ("streamed", {}, post("/v1/completions", BODY | {"stream": True}), 200, "length"),
    ("chat", {}, post("/v1/chat/completions", CHAT), 200, "length"),
    ("stop", {}, post("/v1/completions", BODY | {"ignore_eos": False, "max_tokens": 50}), 200, "stop"),
    ("bad value", {}, post("/v1/completions", BODY | {"n": SECRET}), 400, "invalid_value"),
    ("bad json", {}, lambda s: httpx.post(s.url + "/v1/completions", content=b"{" + SECRET.encode()), 400, "invalid_json"),
    ("no model", {}, post("/v1/completions", BODY | {"model": SECRET}), 404, "model_not_found"),
    ("no path", {}, lambda s: httpx.get(f"{s.url}/nothing?key={SECRET}"), 404, "not_found"),
    ("no method", {}, lambda s: httpx.put(s.url + "/v1/models"), 405, "method_not_allowed"),
    ("no key", {"api_key": "k"}, post("/v1/completions", BODY), 401, "invalid_api_key"),
    ("too large", {"max_body_bytes": 100}, post("/v1/completions", BODY | {"user": "x" * 200}), 413, "body_too_large"),
    ("slow body", {"body_timeout": 0.2}, lambda s: send(s, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"), 408, "body_timeout"),
    ("slow header", {"header_timeout": 0.2}, lambda s: send(s, f"GET /x?{SECRET} HTTP/1.1\r\n".encode()), 408, "header_timeout"),
    ("long header", {}, lambda s: send(s, b"GET /x HTTP/1.1\r\na: " + b"a" * 40_000 + b"\r\n\r\n"), 431, "header_too_large"),
    ("no http", {}, lambda s: send(s, SECRET.encode() + b"\r\n\r\n"), 400, "invalid_http"),
    ("half a header", {}, lambda s: send(s, f"GET /{'x' * 9}?{SECRET}".encode(), answer=False), 499, "client_gone"),
    ("half a body", {}, lambda s: send(s, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{", answer=False), 499, "client_gone"),
    ("models", {}, lambda s: httpx.get(s.url + "/v1/models"), 200, None),
    ("dump", {}, lambda s: httpx.get(s.url + "/dump"), 403, "dump_not_allowed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "act", "status", "reason"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS]
)
def test_every_end_has_its_line(
    tokenizer: Tokenizer, lines: Lines, settings: dict[str, Any], act: Any, status: int, reason: str | None
) -> None:
    with running(FakeEngine(tokenizer=tokenizer), **settings) as server:
        act(server)
        line = lines.one()
    assert (line["status"], line["reason"], line["level"]) == (status, reason, "INFO"), line
    assert line["duration_s"] >= 0 and line["client"].startswith("127.0.0.1:")
    assert "?" not in line["path"] and len(line["request_id"]) == 32 and "\n" not in line["text"]
    assert line["text"].startswith(f"{line['request_id']} {line['method']} {line['path']} {status} ")


def test_what_the_line_of_a_generation_tells(tokenizer: Tokenizer, lines: Lines) -> None:
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.005)
    engine.cached_tokens = 2
    with running(engine) as server:
        body = {**BODY, "n": 2, "max_tokens": 5}
        httpx.post(server.url + "/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        line = lines.one()
    assert (line["method"], line["path"], line["request_id"]) == ("POST", "/v1/completions", "mine-1")
    assert line["prompt_tokens"] == len(engine.seen[0].prompt)  # once, though it was asked for twice
    assert (line["cached_tokens"], line["output_tokens"]) == (2, 10)
    assert 0 < line["ttft_s"] <= line["duration_s"] and line["tokens_per_s"] > 0
    assert "cached_tokens=2 output_tokens=10 ttft_s=" in line["text"]


def test_requests_that_are_cut_off(tokenizer: Tokenizer, lines: Lines) -> None:
    for stream in (True, False):
        engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.02)
        with running(engine) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as s:
                s.sendall(request_bytes(prompt=SECRET, stream=stream))
                wait_until(lambda engine=engine: engine.live == 1)
                if stream:
                    s.recv(100)
            line = lines.one()
            assert (line["status"], line["reason"]) == (200 if stream else 499, "client_gone")
            assert line["prompt_tokens"] == len(engine.seen[0].prompt)
    with running(FakeEngine(tokenizer=tokenizer, fail_after=2)) as server:
        httpx.post(server.url + "/v1/completions", json=BODY | {"max_tokens": 9})
        line = lines.one()
        assert (line["status"], line["reason"]) == (500, "generation_failed")
        httpx.post(server.url + "/v1/completions", json=BODY | {"max_tokens": 9, "stream": True})
        line = lines.one()
        assert (line["status"], line["reason"], line["output_tokens"]) == (200, "generation_failed", 3)


def test_a_full_queue_and_draining(tokenizer: Tokenizer, lines: Lines) -> None:
    with running(FakeEngine(tokenizer=tokenizer, max_live=0)) as server:
        assert httpx.post(server.url + "/v1/completions", json=BODY).status_code == 429
        line = lines.one()
        assert (line["status"], line["reason"], line["output_tokens"]) == (429, "overloaded", 0)
        server.service.draining = True
        httpx.post(server.url + "/v1/completions", json=BODY)
        line = lines.one()
        assert (line["status"], line["reason"]) == (503, "draining")


def test_what_draining_cuts_off(tokenizer: Tokenizer, lines: Lines) -> None:
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.02)
    with running(engine) as server, socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(request_bytes(stream=True))
        assert s.recv(100)
        server.server.stop()
        while s.recv(65536):
            pass
    line = lines.one()
    assert (line["status"], line["reason"]) == (200, "aborted")


def test_a_bug_has_its_line(tokenizer: Tokenizer, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    with running(engine) as server:
        monkeypatch.setattr(server.service, "check_model", None)
        assert httpx.post(server.url + "/v1/completions", json=BODY).status_code == 500
        assert lines.one()["reason"] == "internal_error"
        assert httpx.get(server.url + "/v1/models/x").status_code == 500
        line = lines.one()
        assert (line["status"], line["reason"]) == (500, "internal_error")


def test_probes_are_told_at_debug_only(tokenizer: Tokenizer, lines: Lines) -> None:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        for path in ("/health", "/metrics"):
            httpx.get(server.url + path)
            assert lines.one()["level"] == "DEBUG"


@pytest.mark.parametrize("path", ["/a%0aINFO forged", "/a\nb", "/\x1b[31m", "/" + "x" * 5000, "/é"])
def test_no_path_breaks_the_line(path: str) -> None:
    record = Record("id", "GET", path, "1.2.3.4:5")
    shown = record.fields(0.1)["path"]
    assert re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,300}", shown), shown
