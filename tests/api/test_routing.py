"""Hints of clients and gateways reach the engine; values that mean nothing are refused in one line."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

CLIENT_GONE = b'{path="/v1/prefixes",status="499"} 1.0'


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=small_tokenizer())) as server:
        yield server


def chat(
    server: RunningServer,
    headers: dict[str, str] | None = None,
    *,
    path: str = "chat/completions",
    **body: Any,
) -> httpx.Response:
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2} | body
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers or {})


def marked(ttl: str | None) -> dict[str, Any]:
    return {"cache_control": {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})}


def test_hints_reach_the_engine(server: RunningServer) -> None:
    answer = chat(
        server,
        {"x-dsv4-tenant": "team"},
        user="someone",
        priority=3,
        prompt_cache_key="talk-7",
        deadline_ms=250,
        retention_priority=-1,
    )
    assert answer.status_code == 200, answer.text
    r = server.engine.seen[-1].routing
    assert (r.tenant, r.priority, r.session, r.deadline_ms, r.retention, r.ttl) == (
        "team",
        3,
        "talk-7",
        250,
        -1,
        None,
    )
    assert chat(server, user="someone").status_code == 200
    assert server.engine.seen[-1].routing.tenant == "someone"


@pytest.mark.parametrize(
    ("body", "ttl"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | marked(None)]}]}, 300),
        ({"messages": [{"role": "system", "content": "s"} | marked("1h"), {"role": "user", "content": "x"}]}, 3600),
        ({"tools": [{"type": "function", "function": {"name": "f"}} | marked("5m")]}, 300),
        ({"system": [{"type": "text", "text": "s"} | marked("1h")]}, 3600),
        (marked("5m") | {"system": [{"type": "text", "text": "s"} | marked("1h")]}, 3600),
    ],
)  # fmt: skip
def test_the_longest_cache_control_counts(server: RunningServer, body: dict[str, Any], ttl: float) -> None:
    answer = chat(server, path="messages" if "system" in body else "chat/completions", **body)
    assert answer.status_code == 200, answer.text
    assert server.engine.seen[-1].routing.ttl == ttl


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (marked("2h"), "cache_control.ttl is '2h'; it takes one of 5m, 1h"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | marked("1d")]}]},
            "messages[0].content[0].cache_control.ttl is '1d'; it takes one of 5m, 1h",
        ),
        ({"cache_control": {"type": "forever"}}, "cache_control.type is 'forever'; it takes one of ephemeral"),
        ({"prompt_cache_key": 5}, "prompt_cache_key is 5; it takes text"),
        ({"deadline_ms": -1}, "deadline_ms is -1; it takes a number from 0 to 1e+09; the nearest is 0"),
        ({"retention_priority": 101}, "retention_priority is 101; it takes"),
        ({"priority": 2**40}, "priority is 1099511627776; it takes a whole number from -2147483648 to 2147483647; the nearest is 2147483647"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(server: RunningServer, body: dict[str, Any], message: str) -> None:
    answer = chat(server, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_choices_take_the_state_of_the_first(server: RunningServer) -> None:
    assert len(chat(server, n=3, temperature=0).json()["choices"]) == 3
    first, *rest = (s.fork_of for s in server.engine.seen[-3:])
    assert first is None and len(set(rest)) == 1 and rest[0].endswith("-0")


def test_a_prefix_is_pinned_until_it_is_not(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as http:
        made = http.post("/v1/prefixes", json={"prompt": "Hello there", "cache_salt": "s"}).json()
        assert made["id"] == "pin-1" and made["prompt_tokens"] == len(server.engine.pins[1][0])
        assert server.engine.pins[1][1] == "s"
        assert http.delete("/v1/prefixes/pin-1").json()["deleted"] and not server.engine.pins
        for name in ("pin-1", "nonsense"):
            gone = http.delete(f"/v1/prefixes/{name}")
            assert gone.status_code == 404 and name in gone.json()["error"]["message"]
        assert http.post("/v1/prefixes", json={}).json()["error"]["code"] == "missing_field"


def test_a_pin_whose_process_is_gone_is_forgotten(server: RunningServer) -> None:
    made = httpx.post(f"{server.url}/v1/prefixes", json={"prompt": "Hello there"}).json()["id"]
    server.engine.pins.clear()  # as a new process has none
    assert made in {f"pin-{number}" for number in server.service.pins}
    assert httpx.delete(f"{server.url}/v1/prefixes/{made}").status_code == 404
    assert not server.service.pins


@pytest.mark.parametrize("goes", [True, False])
def test_a_client_gone_while_its_prefix_is_pinned_leaves_no_pin(tokenizer: Tokenizer, goes: bool) -> None:
    class Engine(FakeEngine):
        pinning = may_pin = False
        unpinned: ClassVar[list[int]] = []

        async def pin(self, tokens: Any, salt: str = "") -> int:
            self.pinning = True
            while not self.may_pin:
                await asyncio.sleep(0.001)
            return await super().pin(tokens, salt)

        async def unpin(self, pin: int) -> bool:
            self.unpinned.append(pin)
            return await super().unpin(pin)

    engine = Engine(tokenizer=tokenizer)
    with running(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            body = b'{"prompt": "Hello"}'
            client.sendall(
                b"POST /v1/prefixes HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_until(lambda: engine.pinning)
            if not goes:
                engine.may_pin = True
                got = b""
                while b"pin-1" not in got:  # the head may come alone
                    got += (more := client.recv(10_000))
                    assert more, got
        if goes:
            wait_until(lambda: CLIENT_GONE in server.service.metrics.render())
            engine.may_pin = True
            wait_until(lambda: engine.unpinned == [1])
        assert len(engine.pins) == len(server.service.pins) == (not goes)


def test_a_session_ends(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as http:
        assert http.delete("/v1/sessions/known").json()["cached"] is True
        assert http.delete("/v1/sessions/%0Aof%0Alines%0A").json()["id"] == "\nof\nlines\n"
        assert http.delete("/v1/sessions/a/b").json() == {
            "id": "a/b",
            "object": "session",
            "deleted": True,
            "cached": False,
        }
        for path in ("/v1/sessions", "/v1/sessions/"):
            refused = http.delete(path, follow_redirects=True)
            assert (
                refused.status_code == 400 and "DELETE /v1/sessions/KEY" in refused.json()["error"]["message"]
            )
    assert server.engine.ended == ["known", "\nof\nlines\n", "a/b"]


def test_tenants_are_in_the_metrics(server: RunningServer) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert 'dsv4_tenant_tokens_total{model_name="tiny",tenant=""} 5.0' in text
