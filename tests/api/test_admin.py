"""What only an operator may see and do, and that nobody else gets there."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dsv4.api.keys import hash_of
from dsv4.config import EngineConfig
from dsv4.engine.async_engine import AsyncEngine
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.scripted import scripted
from tests.support.serving import RunningServer, running

ROUTES = [
    ("GET", "/admin/cache"),
    ("POST", "/admin/cache/flush"),
    ("POST", "/flush_cache"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/admin/tenants"),
    ("POST", "/admin/drain"),
    ("POST", "/admin/resume"),
    ("GET", "/admin/requests/x"),
    ("POST", "/admin/profile"),
    ("GET", "/admin/dump"),
    ("GET", "/admin"),
    ("GET", "/admin/nothing"),
]
ADMIN = {"authorization": "Bearer boss"}
BODY = {"model": "default", "prompt": "Hi", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer), admin_key="boss") as server:
        yield server


def file_of_keys(folder: Path) -> str:
    file = folder / "keys.toml"
    tables = {"plain": "", "watcher": "monitor = true", "boss": "admin = true"}
    file.write_text(
        "".join(f'[tenants.{n}]\nkeys = ["{hash_of(n)}"]\n{more}\n' for n, more in tables.items())
    )
    return str(file)


def test_it_is_closed_where_no_key_opens_it(tokenizer: Tokenizer) -> None:
    """Also on a loopback address: every user of the machine, and every page in a browser there, reaches that."""
    for settings in ({}, {"api_key": "k"}):
        with running(FakeEngine(tokenizer=tokenizer), **settings) as server:
            for method, path in ROUTES:
                answer = httpx.request(method, server.url + path, headers={"x-api-key": "k"})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "admin_required", path
                assert "--admin-key" in answer.json()["error"]["message"]
            assert server.engine.asked == [] and not server.service.draining


def test_only_an_admins_key_opens_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with running(FakeEngine(tokenizer=tokenizer), keys_file=file_of_keys(tmp_path), api_key="k") as server:
        for method, path in ROUTES:
            for key, status in (("", 401), ("wrong", 401), ("plain", 403), ("watcher", 403), ("k", 403)):
                got = httpx.request(method, server.url + path, headers={"x-api-key": key})
                assert got.status_code == status, (path, key)
            for odd in (path + "/", "/" + path, path.upper(), path.replace("admin", "%61dmin")):
                got = httpx.request(method, server.url + odd, headers={"x-api-key": "plain"})
                assert got.status_code in (307, 403, 404, 405), odd
        assert server.engine.asked == [] and not server.service.draining
        assert httpx.get(server.url + "/admin/cache", headers={"x-api-key": "boss"}).status_code == 200


def test_figures_of_all_tenants_are_not_for_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with running(FakeEngine(tokenizer=tokenizer), keys_file=file_of_keys(tmp_path), api_key="k") as server:
        for key, status in (("plain", 403), ("watcher", 200), ("boss", 200), ("k", 200)):
            got = httpx.get(server.url + "/metrics", headers={"x-api-key": key})
            assert got.status_code == status, key
        got = httpx.get(server.url + "/dump", headers={"x-api-key": "boss"})
        assert got.status_code == 200, "an admin needs no --allow-dump"
        assert httpx.get(server.url + "/dump", headers={"x-api-key": "watcher"}).status_code == 403


def test_the_rest_stays_open_where_only_an_admins_key_is_set(served: RunningServer) -> None:
    assert httpx.post(served.url + "/v1/completions", json=BODY).status_code == 200
    assert httpx.post(served.url + "/v1/completions", json=BODY, headers=ADMIN).status_code == 200


def test_the_cache(served: RunningServer) -> None:
    made = httpx.post(served.url + "/v1/prefixes", json={"prompt": "Hello"}).json()["id"]
    told = httpx.get(served.url + "/admin/cache", headers=ADMIN).json()
    assert told["stats"]["pages"] == 100 and told["pins"] == [{"id": made, "tenant": ""}]
    assert httpx.delete(f"{served.url}/v1/prefixes/{made}", headers=ADMIN).status_code == 200
    assert httpx.get(served.url + "/admin/cache", headers=ADMIN).json()["pins"] == []
    httpx.post(served.url + "/v1/prefixes", json={"prompt": "Hello"})
    served.engine.pins.clear()  # a new process has none
    assert httpx.get(served.url + "/admin/cache", headers=ADMIN).json()["pins"] == []
    served.engine.asked.clear()
    for path in ("/admin/cache/flush", "/flush_cache", "/reset_prefix_cache"):
        assert httpx.post(served.url + path, headers=ADMIN).json()["freed_pages"] == 7
        assert httpx.get(served.url + path, headers=ADMIN).status_code == 405
    assert served.engine.asked == [("clear_prefix",)] * 3


def test_tenants_and_what_they_use(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = Path(file_of_keys(tmp_path))
    file.write_text(
        file.read_text().replace("[tenants.watcher]", "tokens_per_minute = 1000\n[tenants.watcher]")
    )
    with running(FakeEngine(tokenizer=tokenizer), keys_file=str(file)) as server:
        httpx.post(server.url + "/v1/completions", json=BODY, headers={"x-api-key": "plain"})
        told = httpx.get(server.url + "/admin/tenants", headers={"x-api-key": "boss"}).json()
    assert set(told) == {"plain", "watcher", "boss"}
    plain = told["plain"]
    assert plain["limits"]["tokens_per_minute"] == 1000 and plain["limits"]["max_tokens"] is None
    assert plain["running"] == 0 and plain["left"]["requests"] is None and plain["left"]["tokens"] <= 1000
    assert plain["refused"] == {"requests": 0, "tokens": 0, "concurrent": 0}


def test_draining_and_back(served: RunningServer) -> None:
    told = httpx.post(served.url + "/admin/drain", headers=ADMIN).json()
    assert told == {"draining": True, "running": 0, "waiting": 0, "parked": 0}
    health = httpx.get(served.url + "/health")
    assert health.status_code == 503 and health.json()["status"] == "the server is drained by /admin/drain"
    refused = httpx.post(served.url + "/v1/completions", json=BODY)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert (
        refused.json()["error"]["message"]
        == "the server is drained by /admin/drain and takes no new requests"
    )
    assert httpx.post(served.url + "/admin/resume", headers=ADMIN).json()["draining"] is False
    assert httpx.get(served.url + "/health").status_code == 200
    assert httpx.post(served.url + "/v1/completions", json=BODY).status_code == 200
    served.service.ending = True
    assert httpx.post(served.url + "/admin/resume", headers=ADMIN).status_code == 409
    served.service.ending = False


def test_requests_that_run_are_explained(served: RunningServer) -> None:
    told = httpx.get(served.url + "/admin/requests/live", headers=ADMIN).json()
    assert told == {"id": "live", "object": "explanation", "generations": [{"reason": "none"}], "ended": None}
    httpx.post(served.url + "/v1/completions", json=BODY, headers={"x-request-id": "was"})
    ended = httpx.get(served.url + "/admin/requests/was", headers=ADMIN).json()["ended"]
    assert ended["id"] == "was" and ended["reason"] == "never_stored" and ended["output_tokens"] == 2
    nameless = httpx.get(served.url + "/admin/requests/", headers=ADMIN)
    assert nameless.status_code == 400 and "GET /admin/requests/ID" in nameless.json()["error"]["message"]
    gone = httpx.get(served.url + "/admin/requests/a/b", headers=ADMIN)
    assert gone.status_code == 404 and "'a/b'" in gone.json()["error"]["message"]


def test_no_profile_without_a_place_for_it(served: RunningServer) -> None:
    refused = httpx.post(served.url + "/admin/profile", json={}, headers=ADMIN)
    assert refused.status_code == 403 and "--profile-dir" in refused.json()["error"]["message"]


@pytest.mark.parametrize("phase", ["profile_begin", "profile_state"])
def test_a_client_gone_ends_its_profile(tokenizer: Tokenizer, tmp_path: Path, phase: str) -> None:
    class Engine(FakeEngine):
        async def ask(self, what: str, *arguments: Any) -> Any:
            self.asked.append((what, *arguments))
            await asyncio.sleep(600 if what == phase else 0)
            return 0

    engine = Engine(tokenizer=tokenizer)
    with running(engine, admin_key="boss", profile_dir=str(tmp_path)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = "POST /admin/profile HTTP/1.1\r\nHost: x\r\nX-Api-Key: boss\r\nContent-Length: 2\r\n\r\n{}"
            client.sendall(head.encode())
            wait_until(lambda: any(asked[0] == phase for asked in engine.asked))
        wait_until(lambda: engine.asked[-1][0] == "profile_end")
        assert len({asked[1] for asked in engine.asked}) == 1, "it is the one that was begun"


def test_with_the_engine(tmp_path: Path) -> None:
    config = EngineConfig(num_pages=64, max_num_seqs=2, block_size=128)
    with scripted(step=0.05):
        engine = AsyncEngine.from_config(config)
        with running(engine, admin_key="boss", profile_dir=str(tmp_path)) as server:
            with httpx.Client(base_url=server.url, headers=ADMIN, timeout=120) as http:
                prompt = list(range(5, 600))
                body = {"model": "default", "prompt": prompt, "max_tokens": 3000, "ignore_eos": True}
                asked = {"x-request-id": "mine"}

                def ask() -> None:
                    with contextlib.suppress(httpx.HTTPError):  # the server ends first
                        httpx.post(server.url + "/v1/completions", json=body, headers=asked, timeout=600)

                # Nothing runs: it ends when its time is over, and may be empty.
                assert http.post("/admin/profile", json={"steps": 1000, "seconds": 0.2}).is_success
                threading.Thread(target=ask, daemon=True).start()
                end = time.monotonic() + 120
                while not (found := http.get("/admin/requests/mine")).is_success:
                    assert found.status_code == 404 and time.monotonic() < end
                assert found.json()["generations"][0]["prompt_tokens"] == len(prompt)
                told = http.post("/admin/profile", json={"steps": 3}).json()
                assert told["steps"] == 3 and Path(told["file"]).parent == tmp_path
                with gzip.open(told["file"]) as file:
                    assert "traceEvents" in json.load(file)
                for bad in ({"steps": 0}, {"steps": 10**6}, {"seconds": 0}, {"steps": "x"}):
                    assert http.post("/admin/profile", json=bad).status_code == 400, bad
                tmp_path.rename(tmp_path.with_name("gone"))
                failed = http.post("/admin/profile", json={"steps": 1})
                assert failed.status_code == 409 and failed.json()["error"]["code"] == "profile_failed"
                assert http.get("/health").status_code == 200, "the engine goes on"
                pages = engine.stats()["pages"]
                dump = http.get("/admin/dump").json()
                assert dump["options"]["pages"] == pages
            server.server.stop()
    with scripted():
        engine = AsyncEngine.from_config(config)
        with (
            running(engine, admin_key="boss") as server,
            httpx.Client(base_url=server.url, headers=ADMIN, timeout=60) as http,
        ):
            body["max_tokens"] = 1

            def cached() -> int:
                usage = http.post("/v1/completions", json=body).json()["usage"]
                return usage["prompt_tokens_details"]["cached_tokens"]

            assert cached() == 0 and cached() > 0
            assert http.post("/admin/cache/flush").json()["freed_pages"] > 0
            assert cached() == 0
