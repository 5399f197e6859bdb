"""Fill-in-the-middle: `suffix` of completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

HTTP = httpx.Client(timeout=60)
"""One for all: to make one takes longer than a request."""

NAMES = ("begin", "hole", "end")
BEFORE, AFTER = "def f(x):\n    ", "\n    return y<｜fim▁end｜>"


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(lambda prompt: "y = x", tokenizer=tokenizer)) as server:
        yield server


def post(server: RunningServer, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return HTTP.post(server.url + path, json={"model": "default", "prompt": BEFORE, "max_tokens": 50} | body)


def test_what_goes_between(server: RunningServer) -> None:
    for path in ("/v1/completions", "/beta/completions"):
        answer = post(server, path, suffix=AFTER).json()
        assert answer["choices"][0]["text"] == "y = x"
        tokenizer: Tokenizer = server.engine.tokenizer
        begin, hole, end = (tokenizer.special(f"<｜fim▁{name}｜>") for name in NAMES)
        before, after = (tokenizer.encode_segments([text]) for text in (BEFORE, AFTER))
        assert end not in after, "text is no marker"
        assert server.engine.seen[-1].prompt == [0, begin, *before, hole, *after, end]
    chunks = post(server, suffix=AFTER, stream=True).text.split("\n\n")
    texts = [json.loads(c[6:])["choices"][0]["text"] for c in chunks if c.startswith("data: {")]
    assert "".join(texts) == "y = x"


def test_several_prompts_and_no_suffix(server: RunningServer) -> None:
    assert len(post(server, prompt=["a", ""], suffix="b").json()["choices"]) == 2
    post(server, suffix="")
    assert server.engine.seen[-1].prompt == server.engine.tokenizer.encode(BEFORE)


def test_refusals(server: RunningServer) -> None:
    for body, says in (
        (
            {"prompt": [1, 2], "suffix": "b"},
            "prompt is a list of 2; it takes text where there is a suffix",
        ),
        ({"echo": True, "suffix": "b"}, "echo is true; it takes false with a suffix"),
        ({"suffix": "b " * 9000}, "the prompt has more than 4096 tokens"),
    ):
        answer = post(server, **body)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(says), answer.text


def test_a_tokenizer_without_the_tokens() -> None:
    data = json.loads(
        (resources.files("dsv4") / "data" / "nano" / "tokenizer.json").read_text(encoding="utf-8")
    )
    data["added_tokens"] = [t for t in data["added_tokens"] if "fim" not in t["content"]]
    data["model"]["vocab"] = {k: v for k, v in data["model"]["vocab"].items() if "fim" not in k}
    with running(FakeEngine(tokenizer=Tokenizer(json.dumps(data), "a test"))) as server:
        error = post(server, suffix="b").json()["error"]
        assert (error["param"], error["code"]) == ("suffix", "unsupported_field")
