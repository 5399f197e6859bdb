"""The file of keys: who is let in, what each tenant may, and that no tenant meets another's cache."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dsv4.api.keys import Keys, Tenant, hash_of, new_key
from dsv4.api.limits import Bucket, Meter, span
from dsv4.api.logs import FIELDS
from dsv4.cli import main
from dsv4.config import ServerConfig, load
from dsv4.errors import ConfigError, RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import request_bytes, wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.scripted import OPTIONS, SERVE, children, environment
from tests.support.server_process import server_process
from tests.support.serving import RunningServer, running

FILE = f"""
[tenants.alpha]
keys = ["{hash_of("alpha-1")}", "{hash_of("alpha-2").upper().replace("SHA256", "sha256")}"]
requests_per_minute = 1000
tokens_per_minute = "100k"
max_body_bytes = "1KiB"

[tenants.beta]
keys = ["{hash_of("bêta")}"]
max_tokens = 5
max_prompt_tokens = 20

[tenants.gamma]
keys = ["{hash_of("gamma")}"]
share_cache = true
pin = true

[tenants.delta]
keys = ["{hash_of("delta")}"]
max_concurrent = 1

[tenants.root]
keys = ["{hash_of("root")}"]
admin = true
"""
BODY = {"model": "default", "prompt": "Hi", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(FILE)
    with running(FakeEngine(tokenizer=tokenizer), keys_file=str(file)) as server:
        yield server


def ask(
    server: RunningServer, key: str, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    told = {"authorization": f"Bearer {key}".encode(), **(headers or {})}
    return httpx.post(server.url + "/v1/completions", json=BODY | body, headers=told, timeout=30)


def test_each_key_is_its_tenants(served: RunningServer) -> None:
    for key, tenant in {"alpha-1": "alpha", "alpha-2": "alpha", "bêta": "beta", "gamma": "gamma"}.items():
        assert ask(served, key, {"x-dsv4-tenant": "root"}, user="someone").status_code == 200
        assert served.engine.seen[-1].routing.tenant == tenant, (
            "a tenant's key goes before what a request says"
        )
    assert ask(served, "root", {"x-dsv4-tenant": "beta"}).status_code == 200
    assert served.engine.seen[-1].routing.tenant == "beta", "an admin may ask for another"
    for key in ("none", "alpha", "alpha-3", "ALPHA-1", hash_of("alpha-1"), "x" * 2000):
        assert ask(served, key).status_code == 401, key


def test_caches_and_sessions_are_apart(served: RunningServer) -> None:
    salts, sessions = {}, {}
    for key in ("alpha-1", "alpha-2", "bêta", "gamma"):
        for salt in ("", "s"):
            assert ask(served, key, cache_salt=salt or None, prompt_cache_key="talk").status_code == 200
            salts[key, salt] = served.engine.seen[-1].routing.salt
            sessions[key] = served.engine.seen[-1].routing.session
    assert salts["alpha-1", ""] == salts["alpha-2", ""] and len(set(salts.values())) == 6
    assert salts["gamma", ""] == "" and salts["gamma", "s"] == "s"
    assert sessions["alpha-1"] == sessions["alpha-2"] and len(set(sessions.values())) == 3
    forged = ask(served, "gamma", cache_salt="alpha\0s")
    assert forged.status_code == 400 and "cache_salt" in forged.json()["error"]["message"]
    httpx.delete(served.url + "/v1/sessions/known", headers={"x-api-key": "alpha-1"})
    assert served.engine.ended[-1] == "alpha\0known"


def test_pins_are_for_who_may_and_of_who_made_them(served: RunningServer) -> None:
    def pin(key: str) -> httpx.Response:
        return httpx.post(served.url + "/v1/prefixes", json={"prompt": "Hello"}, headers={"x-api-key": key})

    refused = pin("alpha-1")
    assert refused.status_code == 403 and "pin = true" in refused.json()["error"]["message"]
    of_gamma, of_root = pin("gamma").json()["id"], pin("root").json()["id"]

    def unpin(key: str, name: str) -> int:
        return httpx.delete(f"{served.url}/v1/prefixes/{name}", headers={"x-api-key": key}).status_code

    assert unpin("alpha-1", of_gamma) == 403 and unpin("gamma", of_root) == 404
    assert unpin("gamma", of_gamma) == 200 and unpin("root", of_root) == 200


def test_limits_of_one_request(served: RunningServer) -> None:
    assert ask(served, "bêta", max_tokens=50).json()["usage"]["completion_tokens"] == 5
    assert ask(served, "bêta", max_tokens=None).json()["usage"]["completion_tokens"] == 5
    assert ask(served, "alpha-1", max_tokens=50).json()["usage"]["completion_tokens"] == 50
    long = ask(served, "bêta", prompt="word " * 100).json()["error"]
    assert long["code"] == "context_length_exceeded" and "'beta' may send 20" in long["message"]
    more = ask(served, "bêta", min_tokens=50, max_tokens=60)
    assert more.status_code == 400 and "'beta' may have up to 5" in more.json()["error"]["message"]
    large = ask(served, "alpha-1", user="x" * 2000)
    assert large.status_code == 413 and "1024" in large.json()["error"]["message"]


def test_how_many_at_a_time(tokenizer: Tokenizer, served: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as s:
        slow = request_bytes(stream=True, max_tokens=3000)
        served.engine.step_seconds = 0.01
        s.sendall(slow.replace(b"Host: x\r\n", b"Host: x\r\nx-api-key: delta\r\n", 1))
        assert s.recv(100).startswith(b"HTTP/1.1 200")
        for shape, headers in (("rate_limit_error", {}), ("rate_limit_error", {"anthropic-version": "x"})):
            refused = ask(served, "delta", headers)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == shape
        assert refused.json()["type"] == "error", "in Anthropic's shape for its clients"
        assert ask(served, "alpha-1").status_code == 200, "others go on"
    served.engine.step_seconds = 0.0
    meter = served.service.callers.meters["delta"]
    wait_until(lambda: meter.running == 0, 30)
    assert ask(served, "delta").status_code == 200 and meter.refused["concurrent"] == 2


def test_what_is_left_is_told(served: RunningServer) -> None:
    told = ask(served, "alpha-1").headers
    assert told["x-ratelimit-limit-requests"] == "1000" and told["x-ratelimit-limit-tokens"] == "100000"
    assert 0 < int(told["x-ratelimit-remaining-requests"]) <= 1000
    assert told["x-ratelimit-reset-requests"].endswith("s") and told["x-ratelimit-reset-tokens"].endswith("s")
    other = ask(served, "alpha-1", {"anthropic-version": "2023-06-01"}).headers
    assert other["anthropic-ratelimit-tokens-limit"] == "100000" and "x-ratelimit-limit-tokens" not in other
    assert not [name for name in ask(served, "gamma").headers if "ratelimit" in name]


def test_refusals_for_limits_are_counted_by_tenant(served: RunningServer) -> None:
    text = httpx.get(served.url + "/metrics", headers={"x-api-key": "root"}).text
    for what in ("requests", "tokens", "concurrent"):
        assert f'dsv4_tenant_refused_total{{model_name="tiny",reason="{what}",tenant="alpha"}} 0.0' in text


def test_the_log_names_the_tenant_of_the_key(served: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsv4.request")
    told = {}
    for key in ("gamma", "root", "wrong"):
        caplog.clear()
        ask(served, key, {"x-dsv4-tenant": "someone", "x-request-id": f"of-{key}"}, user="someone")
        wait_until(lambda: [r for r in caplog.records if r.name == "dsv4.request"])
        (line,) = [r for r in caplog.records if r.name == "dsv4.request"]
        told[key] = getattr(line, FIELDS).get("tenant")
        assert "someone" not in line.getMessage(), "what a request says of itself is not told"
    assert told == {"gamma": "gamma", "root": "root", "wrong": None}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused_for(meter: Meter, act: Callable[[], Any]) -> float:
    with pytest.raises(RequestError) as e:
        act()
    assert e.value.status == 429 and e.value.code == "rate_limit_exceeded" and e.value.retry_after is not None
    assert f"try again in {span(e.value.retry_after)}" in e.value.message
    return e.value.retry_after


def test_requests_a_minute() -> None:
    clock = Clock()
    meter = Meter(Tenant("a", requests_per_minute=6), clock)

    def once() -> None:
        with meter.request():
            assert meter.running == 1

    for _ in range(6):
        once()
    assert refused_for(meter, once) == pytest.approx(10) and meter.running == 0
    clock.now += 10
    once()
    refused_for(meter, once)
    clock.now += 1000
    for _ in range(6):  # no more than a minute's worth is saved up
        once()
    refused_for(meter, once)
    assert meter.refused == {"requests": 3, "tokens": 0, "concurrent": 0}


def test_what_is_refused_for_tokens_pays_no_request() -> None:
    clock = Clock()
    meter = Meter(Tenant("a", requests_per_minute=6, tokens_per_minute=600), clock)
    meter.take(601)
    for _ in range(20):
        with pytest.raises(RequestError, match="600 tokens a minute"), meter.request():
            raise AssertionError
    assert meter.shown()["left"] == {"requests": 6, "tokens": -1}
    assert meter.refused == {"requests": 0, "tokens": 20, "concurrent": 0}


def test_tokens_a_minute() -> None:
    clock, params = Clock(), SamplingParams(max_tokens=10)
    meter = Meter(Tenant("a", tokens_per_minute=600), clock)
    meter.admit(400, params, refuse=False)
    assert refused_for(meter, lambda: meter.admit(300, params, refuse=False)) == pytest.approx(10)
    meter.take(-100)  # was in the cache
    meter.admit(300, params, refuse=False)
    meter.take(60)  # an answer may leave a debt
    with pytest.raises(RequestError, match="600 tokens a minute"), meter.request():
        raise AssertionError
    clock.now += 60
    meter.take(60)
    clock.now += 12
    meter.admit(10**6, params, refuse=False)  # more than a minute's worth has to go through as well
    assert refused_for(meter, lambda: meter.admit(1, params, refuse=False)) > 99_000


def test_limits_that_change_keep_what_was_used() -> None:
    clock = Clock()
    bucket = Bucket(100, clock)
    bucket.take(60)
    assert bucket.resized(200).level == pytest.approx(140) and bucket.resized(10).level == pytest.approx(-50)
    assert bucket.resized(10).wait(10) == pytest.approx(360)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (3, "3s"), (59.5, "1m0s"), (90, "1m30s")],
)
def test_spans_of_time(seconds: float, text: str) -> None:
    assert span(seconds) == text


GOOD = f'keys = ["{hash_of("k")}"]'
WRONG = {
    "": "no tenants",
    "x": "no TOML",
    "[tenant.a]\n" + GOOD: "did you mean 'tenants'",
    "tenants = 5": "has no tenants",
    "[tenants]\na = 5": "tenants.a is a number; it takes a table",
    "[tenants.a]": "tenants.a.keys is missing",
    "[tenants.a]\nkeys = []": "tenants.a.keys is missing",
    '[tenants.a]\nkeys = ["sk-secret"]': "tenants.a.keys[0] is no hash",
    f'[tenants.a]\nkeys = ["{hash_of("k")[:-1]}"]': "is no hash",
    f"[tenants.a]\n{GOOD}\nmax_tokns = 5": "did you mean 'max_tokens'?",
    f"[tenants.a]\n{GOOD}\nmax_tokens = 0": "tenants.a.max_tokens is 0; it takes a whole number from 1; the nearest is 1",
    f"[tenants.a]\n{GOOD}\nmax_tokens = true": "max_tokens is True; it takes a whole number from 1",
    f"[tenants.a]\n{GOOD}\nmax_tokens = 1.5": "it takes a whole number",
    f'[tenants.a]\n{GOOD}\nmax_tokens = "many"': "it takes a whole number",
    f'[tenants.a]\n{GOOD}\nmax_body_bytes = "many"': "it takes a size such as 2MiB",
    f"[tenants.a]\n{GOOD}\nadmin = 1": "tenants.a.admin is 1; it takes true or false",
    f'[tenants."a\\nb"]\n{GOOD}': "is no name",
    f"[tenants.a]\n{GOOD}\n[tenants.b]\n{GOOD}": "another tenant has too",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        Keys(ServerConfig(keys_file=str(file)))
    said = str(e.value)
    assert message in said and said.startswith(f"keys_file {file}") and "\n" not in said and "sk-" not in said


def test_no_file_and_keys_of_the_server_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Keys(ServerConfig(keys_file=str(tmp_path / "none.toml")))
    for key in ("", " ", "a b"):
        with pytest.raises(ConfigError, match="admin_key"):
            load([ServerConfig], {"admin_key": key}, {})
    with pytest.raises(ConfigError, match="admin_key is the api_key"):
        ServerConfig(api_key="k", admin_key="k")
    assert len({new_key() for _ in range(100)}) == 100 and len(new_key()) > 50


def test_keys_are_made_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    assert main(["key", 'a "b"']) == 0 and main(["key", "other"]) == 0
    out, err = capsys.readouterr()
    file.write_text(out)
    first, second = re.findall(r"sk-dsv4-\S+", err)
    keys = Keys(ServerConfig(keys_file=str(file)))
    found = [keys.find([key]) for key in (first, second, "sk-dsv4-")]
    assert [t and t.name for t in found] == ['a "b"', "other", None] and "sk-dsv4-" not in out


def test_the_hash_of_a_key_that_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("mine\n"))
    assert main(["key", "team", "--stdin"]) == 0
    assert capsys.readouterr().out == f'[tenants."team"]\nkeys = ["{hash_of("mine")}"]\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["key", "team", "--stdin"]) == 2


def test_what_opens_the_server_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    assert Keys(ServerConfig()).describe().startswith("none")
    told = Keys(ServerConfig(api_key="k", keys_file=str(file), admin_key="a")).describe()
    assert told == f"--api-key and 6 of 5 tenants in {file}"


def test_the_file_is_read_again_at_sighup(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[tenants.a]\nkeys = ["{hash_of("old")}"]\nrequests_per_minute = 50\n')
    with server_process(keys_file=file) as (process, port):

        def status(key: str) -> int:
            return httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"x-api-key": key}).status_code

        def send(text: str, until: Callable[[], bool]) -> None:
            file.write_text(text)
            os.kill(process.pid, signal.SIGHUP)
            end = time.monotonic() + 30
            while not until():
                assert time.monotonic() < end, "the file was not read"
                time.sleep(0.05)

        assert status("old") == 200 and status("new") == 401
        send(f'[tenants.b]\nkeys = ["{hash_of("new")}"]\n', lambda: status("new") == 200)
        assert status("old") == 401
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "none"])
def test_a_reload_while_the_model_loads_ends_nothing(tmp_path: Path, keys: bool) -> None:
    """Nor does one afterwards where there is no file, which is logged."""
    file = tmp_path / "keys.toml"
    file.write_text(f'[tenants.a]\nkeys = ["{hash_of("k")}"]\n')
    command = [sys.executable, "-c", SERVE, *(("--keys-file", str(file)) if keys else ()), *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(load=1.0)) as process:
        assert process.stderr is not None
        (engine,) = until(lambda: children(process.pid), 60)
        until(lambda: ignores_hangup(engine), 60)
        for pid in (process.pid, engine):
            os.kill(pid, signal.SIGHUP)
        ready = next(line for line in process.stderr if line.startswith("ready"))
        answer = httpx.get(ready.split()[1] + "/v1/models", headers={"x-api-key": "k"})
        assert answer.status_code == 200 and children(process.pid) == [engine]
        if not keys:
            process.send_signal(signal.SIGHUP)
            assert any("no --keys-file to read again" in line for line in process.stderr)
            assert httpx.get(ready.split()[1] + "/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def until(what: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def ignores_hangup(pid: int) -> bool:
    """Whether a process has come so far that it ignores SIGHUP: signal 1, the lowest bit."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigIgn:")[1].split()[0], 16) & 1)


def test_a_file_that_became_wrong_changes_nothing(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    with running(FakeEngine(tokenizer=tokenizer), keys_file=str(file)) as server:
        used = server.service.callers.meters["alpha"]
        file.write_text(FILE.replace("[tenants.beta]", "[tenants.beta"))
        server.server.reread_keys()
        wait_until(lambda: "the keys stay as they are" in caplog.text, 30)
        assert ask(server, "alpha-1").status_code == 200 and ask(server, "bêta").status_code == 200
        file.write_text(FILE.replace("requests_per_minute = 1000", "requests_per_minute = 1"))
        server.server.reread_keys()
        wait_until(lambda: used.tenant.requests_per_minute == 1, 30)
        assert [ask(server, "alpha-1").status_code for _ in range(2)][1] == 429
