"""Bodies as unmodified clients sent them (long texts cut short): Claude Code 2.1, Codex 0.163, smolagents 1.26, LlamaIndex 0.14 and llm
in the fourth request of a tool loop, aider 0.86 with a file, Instructor 1.17 asking for an object in two dialects. `make test-clients` runs
the clients themselves."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

HTTP = httpx.Client(timeout=60)
"""One for all: to make one takes longer than a request."""

BODIES = Path(__file__).parent.parent / "data" / "clients"


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = FakeEngine(lambda prompt: "Hm.</think>All done.", tokenizer=tokenizer, max_model_len=32768)
    with running(engine, served_model_name=("dsv4",)) as server:
        yield server


def sent(server: RunningServer, name: str, **more: Any) -> tuple[httpx.Response, str]:
    """The answer, and what the model read."""
    recorded = json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))
    answer = HTTP.post(server.url + recorded["path"], json=recorded["body"] | more)
    assert answer.status_code == 200, answer.text
    engine = server.engine
    return answer, engine.tokenizer.decode(engine.seen[-1].prompt, skip_special=False)


NAMES = sorted(path.stem for path in BODIES.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_body_is_answered(server: RunningServer, name: str) -> None:
    whole, read = sent(server, name, stream=False)
    streamed, again = sent(server, name, stream=True)
    assert "All done." in whole.text and streamed.headers["content-type"].startswith("text/event-stream")
    assert read == again and "billing" not in read and read.startswith("<｜begin▁of▁sentence｜>")


@pytest.mark.parametrize("name", ["claude_code", "codex"])
def test_a_recorded_loop_reads_as_the_model_wrote_it(server: RunningServer, name: str) -> None:
    _, read = sent(server, name)
    for turn in range(3):
        thought, call = (
            "<think>Let me think.</think>I will run it.\n\n<｜DSML｜tool_calls>",
            f"echo dsv4-was-here {turn}",
        )
        assert read.count(thought) == 3 and f">{call}</｜DSML｜parameter>" in read
        assert f"<tool_result>dsv4-was-here {turn}" in read
    assert read.endswith("<｜Assistant｜><think>")
    routing = server.engine.seen[-1].routing
    assert routing.session and "web_search" not in read


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    1e308,
    "",
    "x\ud800\0",
    [],
    {},
    [None],
    [[]],
    {"type": "x"},
    [{"type": "text"}],
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(Holder, key) of everything in a body."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_body_is_refused_or_answered_but_never_a_fault(server: RunningServer, name: str) -> None:
    recorded = json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))
    rng, url = random.Random(3), server.url + recorded["path"]
    with httpx.Client() as client:
        for _ in range(250):
            body = copy.deepcopy(recorded["body"]) | {"stream": rng.random() < 0.5}
            holder, key = rng.choice(list(places(body)))
            holder[key] = odd = rng.choice(ODD)
            answer = client.post(url, content=json.dumps(body))
            assert answer.status_code in (200, 400, 404), (key, odd, answer.text)
            if answer.status_code != 200:
                message = answer.json()["error"]["message"]
                assert message and "\n" not in message and len(message) < 400, (key, odd, message)
