"""Where a server listens: addresses, names, Unix sockets, and what is said when it cannot."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from dsv4.api import listen
from dsv4.api.listen import bind, bind_all, bind_unix, remove_dead
from dsv4.api.loading import Loading
from dsv4.api.server import make_server
from dsv4.api.service import Service
from dsv4.cli.serve import ready_text
from dsv4.config import ServerConfig
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def close(sockets: list[socket.socket]) -> None:
    for s in sockets:
        s.close()


def test_a_port_is_given_to_one_server_only() -> None:
    """Both listen nowhere yet when they ask: a bound socket that does not listen keeps nobody out."""
    first = bind("127.0.0.1", 0)
    with first, pytest.raises(ConfigError, match="already in use") as e:
        bind("127.0.0.1", first.getsockname()[1])
    assert "\n" not in str(e.value) and "--port" in str(e.value)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_with_and_without_brackets(host: str) -> None:
    sockets = bind_all(host, 0)
    assert [s.getsockname()[0] for s in sockets] == ["::1"]
    port = sockets[0].getsockname()[1]
    with pytest.raises(ConfigError, match=rf"\[::1\]:{port}: "):
        bind_all(host, port)
    close(sockets)


@needs_ipv6
def test_a_name_with_several_addresses_has_one_port_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    family, kind = socket.AF_INET, socket.SOCK_STREAM
    found = [
        (family, kind, 6, "", ("127.0.0.1", 0)),
        (family, kind, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, kind, 6, "", ("::1", 0, 0, 0)),
        (family, kind, 6, "", ("203.0.113.7", 0)),  # which this machine does not have
    ]
    monkeypatch.setattr(listen.socket, "getaddrinfo", lambda *a, **k: found)
    sockets = bind_all("both", 0)
    assert {s.getsockname()[0] for s in sockets} == {"127.0.0.1", "::1"} and len(sockets) == 2
    ports = {s.getsockname()[1] for s in sockets}
    assert len(ports) == 1
    sockets.pop().close()  # one of the two addresses is free, the other is not
    with pytest.raises(ConfigError, match="in use"):
        bind_all("both", ports.pop())
    close(sockets)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "127.0.0.1"])
def test_usual_hosts_can_be_reached(host: str) -> None:
    sockets = bind_all(host, 0)
    socket.create_connection(("127.0.0.1", sockets[0].getsockname()[1])).close()
    close(sockets)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("", ["empty", "127.0.0.1"]),
        (" ", ["empty"]),
        ("nowhere.invalid", ["nowhere.invalid", "no address"]),
        ("http://127.0.0.1", ["no scheme"]),
        ("127.0.0.1:80", ["no port"]),
        ("203.0.113.7", ["203.0.113.7:0", "--host"]),
        ("a" * 300, ["no address"]),
    ],
)
def test_hosts_that_are_none(host: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        bind_all(host, 0)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_a_unix_socket_is_for_owner_and_group_and_replaces_a_dead_one(tmp_path: Path) -> None:
    path = str(tmp_path / "dsv4.sock")
    bind_unix(path).close()  # as a killed server leaves it
    with bind_unix(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        with pytest.raises(ConfigError, match="another server listens there"):
            bind_unix(path)
        remove_dead(path)
        assert os.path.exists(path)  # it is alive
    remove_dead(path)
    assert not os.path.exists(path)
    with bind_unix(path, 0o600):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(file)
    for path, words in (
        (file, "is no socket"),
        (link, "is no socket"),
        (tmp_path / "none" / "x", "directory does not exist"),
        (tmp_path / ("x" * 120), "at most 107"),
    ):
        with pytest.raises(ConfigError, match=words):
            bind_unix(str(path))
    assert file.read_text() == "mine"


def test_serving_on_a_unix_socket(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(tmp_path / "dsv4.sock")
    service = Service(FakeEngine(tokenizer=tokenizer), ServerConfig(drain_timeout=0), "tiny")
    ready = threading.Event()
    server = make_server(service, ready.set)
    thread = threading.Thread(target=server.run, args=([bind_unix(path)],), daemon=True)
    thread.start()
    assert ready.wait(10)
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://any") as client:
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    curl = ["curl", "-s", "--unix-socket", path, "http://localhost/v1/models"]
    assert b'"tiny"' in subprocess.run(curl, capture_output=True, check=True).stdout
    server.stop()
    thread.join(60)
    service.close()
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("127.0.0.1", 80), ["ready      http://127.0.0.1:80\n", "curl http://127.0.0.1:80/v1/"]),
        (("0.0.0.0", 80), ["curl http://127.0.0.1:80/v1/"]),
        (("::", 80, 0, 0), ["curl http://[::1]:80/v1/"]),
        (("fe80::1", 80, 0, 2), ["curl http://[fe80::1]:80/v1/"]),
        ("/run/a b.sock", ["unix:/run/a b.sock", "curl --unix-socket '/run/a b.sock' http://localhost/v1/"]),
    ],
)
def test_the_ready_line_names_what_works(place: object, words: list[str]) -> None:
    open_to_all = SimpleNamespace(keys=SimpleNamespace(required=False))
    service = SimpleNamespace(
        config=ServerConfig(), engine=SimpleNamespace(tokenizer=None), callers=open_to_all
    )
    text = ready_text(service, [place])  # type: ignore[arg-type]
    assert all(w in text for w in words), text


def test_requests_while_the_model_loads_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsv4.request")
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with Loading([sock]):
            health = httpx.get(url + "/health")
            assert health.status_code == 503 and health.json() == {"status": "the model is loading"}
            big = httpx.post(url + "/v1/completions", content=b"x" * 100_000)
            assert big.status_code == 503 and big.headers["retry-after"] == "5"
            assert big.json()["error"]["code"] == "loading"
        (line,) = (r.getMessage() for r in caplog.records if r.name == "dsv4.request")
        assert " POST /v1/completions 503 reason=loading client=127.0.0.1:" in line
        waiting = socket.create_connection(sock.getsockname())  # this one gets the server's answer
        sock.setblocking(True)
        sock.settimeout(10)
        accepted, peer = sock.accept()
        with accepted, waiting:
            assert peer == waiting.getsockname()
