"""Browsers: which pages may use the server, and that they can read what it says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import pytest
from dsv4.config import ServerConfig, load
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

PAGE = "https://chat.example.com"
BODY = {"model": "default", "prompt": "Hi", "max_tokens": 3}
KEY = {"authorization": "Bearer k"}
ASK = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def open_to_one(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    origins = (PAGE, "http://localhost:3000")
    with running(FakeEngine(tokenizer=tokenizer), api_key="k", allow_origin=origins) as server:
        yield server


def test_a_preflight_needs_no_key(open_to_one: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsv4.request")
    url = open_to_one.url + "/v1/chat/completions"
    answer = httpx.options(url, headers={"origin": PAGE, **ASK})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    wait_until(lambda: " OPTIONS /v1/chat/completions 200 " in caplog.text)  # it has its line like any other
    other = httpx.options(url, headers={"origin": "https://evil.example", **ASK})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/completions", BODY, KEY, 200),
        ("/v1/completions", BODY | {"stream": True}, KEY, 200),
        ("/v1/completions", BODY, {}, 401),
        ("/v1/completions", {"n": "x"}, KEY, 400),
        ("/nothing", BODY, KEY, 404),
        ("/v1/models", BODY, KEY, 405),
    ],
)
def test_a_page_can_read_answers_and_errors(
    open_to_one: RunningServer, path: str, body: dict, headers: dict[str, str], status: int
) -> None:
    for origin, allowed in ((PAGE, True), ("https://evil.example", False)):
        answer = httpx.post(open_to_one.url + path, json=body, headers={"origin": origin, **headers})
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert "Origin" in answer.headers["vary"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_stream_is_not_held_back(tokenizer: Tokenizer) -> None:
    """Its first token is there while the engine is still at work."""
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.05)
    body = BODY | {"stream": True, "max_tokens": 4000, "ignore_eos": True}
    with (
        running(engine, allow_origin=("*",)) as server,
        httpx.stream("POST", server.url + "/v1/completions", json=body, headers={"origin": PAGE}) as answer,
    ):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert next(answer.iter_lines()).startswith("data: {") and engine.live == 1


def test_without_the_setting_nothing_is_allowed(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        answer = httpx.get(server.url + "/v1/models", headers={"origin": PAGE})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert httpx.options(server.url + "/v1/models", headers={"origin": PAGE, **ASK}).status_code == 405


def test_ways_to_set_it() -> None:
    both = ("https://a.example", "http://localhost:3000")
    assert load([ServerConfig], {"allow_origin": list(both)}, {})[0].allow_origin == both
    assert load([ServerConfig], {}, {"DSV4_ALLOW_ORIGIN": ", ".join(both)})[0].allow_origin == both
    for good in ("*", "null", "http://[::1]:3000", "app://x"):
        assert load([ServerConfig], {"allow_origin": good}, {})[0].allow_origin == (good,)


@pytest.mark.parametrize(
    ("origin", "near"),
    [
        ("chat.example.com", "https://chat.example.com"),
        ("https://chat.example.com/", "https://chat.example.com"),
        ("https://Chat.Example.com/app", "https://chat.example.com"),
        ("", "scheme and a host"),
    ],
)
def test_origins_that_no_browser_sends_are_refused(origin: str, near: str) -> None:
    with pytest.raises(ConfigError) as e:
        ServerConfig(allow_origin=(origin,))
    assert near in str(e.value) and "\n" not in str(e.value)
