"""The API key: how it may be sent, and keys that would be none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsv4.config import ServerConfig, load
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer), api_key="sésame") as server:
        yield server


RIGHT = [
    {"authorization": "Bearer sésame"},
    {"authorization": "bearer sésame"},
    {"authorization": "BEARER   sésame"},
    {"authorization": "bEaReR sésame  "},
    {"authorization": "\tBearer\tsésame\t"},
    {"Authorization": "Bearer sésame", "x-api-key": "another"},
    {"x-api-key": "sésame"},
    {"X-API-Key": " sésame "},
    {"authorization": "Basic c2VzYW1l", "x-api-key": "sésame"},
]
WRONG = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": "sésame"},
    {"authorization": "Bearersésame"},
    {"authorization": "Basic sésame"},
    {"authorization": "Bearer Bearer sésame"},
    {"authorization": "Bearer sésame sésame"},
    {"authorization": "Bearer SÉSAME"},
    {"authorization": "Bearer s\xe9"},
    {"x-api-key": ""},
    {"x-api-key": "Bearer sésame"},
]


@pytest.mark.parametrize(("headers", "status"), [(h, 200) for h in RIGHT] + [(h, 401) for h in WRONG])
def test_ways_to_send_it(locked: RunningServer, headers: dict[str, str], status: int) -> None:
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())  # by hand: httpx sends no odd white space
    with socket.create_connection(("127.0.0.1", locked.port)) as s:
        s.sendall(f"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lines}\r\n".encode())
        answer = b"".join(iter(lambda: s.recv(65536), b"")).lower()
    assert answer.startswith(b"http/1.1 %d " % status), answer
    if status == 401:
        assert b"\r\nwww-authenticate: bearer\r\n" in answer and b'"invalid_api_key"' in answer


KEYS = {"": "empty", "  ": "white space", "\t\n": "white space", "a b": "white space", "a\x00b": "control"}


@pytest.mark.parametrize(("key", "word"), KEYS.items())
def test_a_key_that_is_none_is_refused(key: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "dsv4.yaml"
    file.write_text(f"api_key: {json.dumps(key) if key else ''}\n")
    for flags, env, yaml in (({"api_key": key}, {}, None), ({}, {"DSV4_API_KEY": key}, None), ({}, {}, file)):
        with pytest.raises(ConfigError, match=word) as e:
            load([ServerConfig], flags, env, yaml)
        assert "\n" not in str(e.value) and "api_key" in str(e.value) and "a b" not in str(e.value)


def test_a_key_named_none_is_a_key(tmp_path: Path) -> None:
    assert load([ServerConfig], {"api_key": "none"}, {})[0].api_key == "none"
    assert load([ServerConfig], {}, {"DSV4_API_KEY": "null"})[0].api_key == "null"
    assert load([ServerConfig], {"api_key": "good"}, {"DSV4_API_KEY": ""})[0].api_key == "good"
    assert load([ServerConfig], {}, {})[0].api_key is None


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_serve_does_not_start_with_an_empty_key(way: str) -> None:
    command = [sys.executable, "-m", "dsv4.cli", "serve", "--port", "0"]
    env = {**os.environ, **({"DSV4_API_KEY": ""} if way == "environment" else {})}
    ran = subprocess.run(
        command + (["--api-key", ""] if way == "flag" else []), capture_output=True, text=True, env=env
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "api_key is empty" in ran.stderr
