"""The page's files over HTTP, and the figures that it shows. What it does is in tests/browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from dsv4.api import static
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
LARGEST = 60 * 1024


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = FakeEngine(tokenizer=tokenizer)
    engine.cached_tokens = 2
    with running(engine, api_key="sesame") as server:
        yield server


def test_browsers_get_the_page_and_programs_json(served: RunningServer) -> None:
    page = httpx.get(served.url, headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<title>dsv4</title>" in page.text
    for accept in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        assert httpx.get(served.url, headers=accept).json()["name"] == "dsv4"
    assert "Accept" in page.headers["vary"]
    assert httpx.head(served.url, headers=BROWSER).headers["content-length"] == str(len(page.content))


def test_every_file_is_there_and_small(served: RunningServer) -> None:
    files = static.read_all()
    assert sum(len(body) for body, _ in files.values()) < LARGEST
    named = set(re.findall(rb'(?:href|src)="page/([^"]+)"', files["index.html"][0]))
    imported = {n for body, _ in files.values() for n in re.findall(rb'from "\./([^"]+)"', body)}
    assert {name.decode() for name in named | imported} == files.keys() - {"index.html"}
    for name, (body, tag) in files.items():
        got = httpx.get(f"{served.url}/page/{name}")
        assert got.status_code == 200 and got.content == body and got.headers["etag"] == tag
        assert got.headers["content-type"] == static.TYPES[name.rpartition(".")[2]]
        again = httpx.get(f"{served.url}/page/{name}", headers={"if-none-match": tag})
        assert again.status_code == 304 and not again.content


def test_the_policy_lets_nothing_else_in(served: RunningServer) -> None:
    for path in ("/", "/page/app.js", "/page/page.css"):
        headers = httpx.get(served.url + path, headers=BROWSER).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert policy["style-src"] == "'self'" and policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and policy["base-uri"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_nothing_in_the_files_asks_for_more() -> None:
    """No script or style within the markup, no address of another server, no text that is made to code or markup."""
    files = {name: body.decode() for name, (body, _) in static.read_all().items()}
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", files["index.html"])
    for name, text in files.items():
        assert not re.search(r"(?:src|href|url\(|import|fetch\()\W{0,3}(?:https?:)?//", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser", text
        ), name


@pytest.mark.parametrize(
    "name", ["nothing.js", "appp.js", "..%2finfo.py", "%2e%2e/static.py", "", "a" * 5000]
)
def test_nothing_but_its_files(served: RunningServer, name: str) -> None:
    got = httpx.get(f"{served.url}/page/{name}")
    assert got.status_code == 404 and "error" in got.json()
    if name == "appp.js":
        assert "did you mean 'app.js'?" in got.json()["error"]["message"]


def test_the_page_needs_no_key_and_all_else_does(locked: RunningServer) -> None:
    assert httpx.get(locked.url, headers=BROWSER).status_code == 200
    assert httpx.get(f"{locked.url}/page/app.js").status_code == 200
    for path, headers in (
        ("/", {}),
        ("/stats", BROWSER),
        ("/v1/models", BROWSER),
        ("/pages", BROWSER),
        ("/page", BROWSER),
    ):
        assert httpx.get(locked.url + path, headers=headers).status_code == 401, path
    assert httpx.post(locked.url, headers=BROWSER).status_code in (401, 405)


def test_stats_tell_of_the_last_requests(locked: RunningServer) -> None:
    key = {"authorization": "Bearer sesame"}
    before = httpx.get(f"{locked.url}/stats", headers=key).json()
    body = {"prompt": "What is cached of this?", "max_tokens": 3}
    done = httpx.post(
        f"{locked.url}/v1/completions", json=body, headers=key | {"x-request-id": "asked-1"}
    ).json()
    assert (
        httpx.post(f"{locked.url}/v1/completions", json=body | {"max_tokens": -1}, headers=key).status_code
        == 400
    )
    after = httpx.get(f"{locked.url}/stats", headers=key).json()
    newest, usage = after["recent"][0], done["usage"]
    assert len(after["recent"]) == len(before["recent"]) + 1
    assert newest["id"] == "asked-1" and newest["reason"] == "never_stored" and newest["finish"] == "length"
    assert newest["prompt_tokens"] == usage["prompt_tokens"] and newest["output_tokens"] == 3
    assert newest["cached_tokens"] == newest["resumed_at"] == 2
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 3
    assert after["requests"]["ended"]["length"] - before["requests"]["ended"]["length"] == 1
    assert "What is cached" not in str(after)
    for i in range(30):
        httpx.post(f"{locked.url}/v1/completions", json=body, headers=key | {"x-request-id": f"more-{i}"})
    recent = httpx.get(f"{locked.url}/stats", headers=key).json()["recent"]
    assert [hit["id"] for hit in recent] == [f"more-{i}" for i in range(29, 9, -1)]
