"""`dsv4 dynamo` behind Dynamo's frontend and KV router, all processes of this machine. Skipped where Dynamo is missing; `make
test-fleet` brings it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.running import HELLO, Fleet, content, figure, fleet, low_port, until
from tests.support.scripted import children

pytest.importorskip("dynamo.common", reason="needs Dynamo: make test-fleet")
pytestmark = [pytest.mark.timeout(900), pytest.mark.contract]

KV = ("--router-mode", "kv")
WHO = [{"role": "user", "content": "Who are you?"}]
IAM = "I am Nano, a tiny language model"
ENDLESS: dict[str, Any] = {"messages": WHO, "ignore_eos": True, "max_tokens": 200}
"""Some seconds of tokens."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
WHERE = {"extra_fields": ["worker_id"]}


class Two:
    """A fleet of two workers, with the ports of their metrics."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.ports = fleet, list[int]()
        fleet.frontend(*KV)
        for name in "ab":
            self.ports.append(low_port())
            fleet.worker(name, "--metrics-port", str(self.ports[-1]))

    def metrics(self) -> list[str]:
        """Of each worker."""
        return [httpx.get(f"http://127.0.0.1:{port}/metrics").text for port in self.ports]

    def sum(self, name: str) -> float:
        return sum(figure(text, name) for text in self.metrics())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with fleet(tmp_path_factory.mktemp("fleet")) as made:
        yield Two(made)


def worker_of(answer: dict[str, Any]) -> int:
    """The number of the worker that gave an answer, or an event of one."""
    found: int = answer["nvext"]["worker_id"]["decode_worker_id"]
    return found


def test_it_answers_and_streams_the_same(two: Two) -> None:
    whole = two.fleet.chat("Who are you?")
    [choice] = whole["choices"]
    assert choice["message"]["content"].startswith(IAM) and choice["finish_reason"] == "stop"
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    events = list(two.fleet.stream(messages=WHO, stream_options={"include_usage": True}))
    assert content(events) == choice["message"]["content"] and len(events) > 10
    assert events[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert two.fleet.chat("Who are you?", max_tokens=3)["choices"][0]["finish_reason"] == "length"
    text = two.fleet.ask("/v1/completions", prompt=[5, 6, 7], max_tokens=4).json()
    assert text["usage"]["prompt_tokens"] == 3 and text["usage"]["completion_tokens"] == 4


def test_choices_end_each_for_itself(two: Two) -> None:
    """With a seed a choice is what one of the next seed alone would be."""
    asked: dict[str, Any] = {"prompt": "A list of", "temperature": 1, "max_tokens": 12, "ignore_eos": True}
    both = two.fleet.ask("/v1/completions", **asked, n=2, seed=5).json()
    alone = [two.fleet.ask("/v1/completions", **asked, seed=seed).json() for seed in (5, 6)]
    assert [c["text"] for c in both["choices"]] == [a["choices"][0]["text"] for a in alone]
    assert sorted(str(c.get("finish_reason")) for c in both["choices"]) == [
        "None",
        "length",
    ]  # Dynamo takes one
    assert both["usage"]["completion_tokens"] == 24
    assert both["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    ended = two.fleet.chat("Who are you?", n=3, temperature=0.01)
    assert [c["finish_reason"] for c in ended["choices"]] == ["stop"] * 3
    assert all(c["message"]["content"].startswith(IAM) for c in ended["choices"])
    assert "cached_tokens" in ended["usage"]["prompt_tokens_details"]


def test_log_probabilities_and_stop_strings(two: Two) -> None:
    [choice] = two.fleet.chat("Who are you?", max_tokens=3, logprobs=True, top_logprobs=2)["choices"]
    told = choice["logprobs"]["content"]
    assert [t["token"] for t in told] == ["I", " am", " N"]
    for token in told:
        best = [top["logprob"] for top in token["top_logprobs"]]
        assert token["logprob"] == best[0] > best[1]
    [choice] = two.fleet.chat("Who are you?", stop=["tiny"])["choices"]
    assert choice["message"]["content"] == "I am Nano, a " and choice["finish_reason"] == "stop"


def test_calls_thoughts_and_forms(two: Two) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 100}
    [choice] = two.fleet.chat("What is the weather in Paris?", **asked)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    streamed = two.fleet.stream(
        messages=[{"role": "user", "content": "What is the weather in Paris?"}], **asked
    )
    deltas = [c["delta"] for event in streamed for c in event["choices"]]
    pieces = [t["function"] for d in deltas for t in d.get("tool_calls") or []]
    assert json.loads("".join(p.get("arguments") or "" for p in pieces)) == {"city": "Paris"}

    forced = {"guided_choice": ["red", "green"], "thinking": {"type": "enabled"}}
    [choice] = two.fleet.chat("Hi", **forced, max_tokens=200)["choices"]
    assert choice["message"]["content"] in ("red", "green") and choice["message"]["reasoning_content"]
    plain = two.fleet.chat("Hi", guided_choice=["red", "green"])["choices"][0]["message"]
    assert plain["content"] in ("red", "green") and not plain.get("reasoning_content")


def test_a_bad_request_is_told_as_one(two: Two) -> None:
    answer = two.fleet.ask(messages=HELLO, guided_regex="[a")
    assert answer.status_code == 400 and "structured_outputs.regex" in answer.json()["message"]
    answer = two.fleet.ask(messages=[{"role": "user", "content": "word " * 5000}])
    assert answer.status_code == 400


def test_a_conversation_goes_back_to_the_worker_that_has_its_prefix(two: Two) -> None:
    """Turn by turn, four at a time; what was cached is told to the client, and a salt keeps prefixes apart."""
    told: dict[int, list[dict[str, Any]]] = {}
    talks = [
        [{"role": "user", "content": f"Story {i}: " + f"{'abcd'[i]} word of it. " * 60}] for i in range(4)
    ]
    for _ in range(3):
        for i, talk in enumerate(talks):
            whole = two.fleet.ask(messages=talk, max_tokens=8, ignore_eos=True, nvext=WHERE).json()
            told.setdefault(i, []).append(whole)
            talk.append({"role": "assistant", "content": whole["choices"][0]["message"]["content"] or ""})
            talk.append({"role": "user", "content": "And then?"})
        until(lambda: two.sum("vllm:num_requests_running") == 0)
    for turns in told.values():
        assert len({worker_of(turn) for turn in turns}) == 1
        cached = [turn["usage"]["prompt_tokens_details"]["cached_tokens"] for turn in turns]
        assert cached[0] == 0 and cached[1] >= 128 and cached[2] >= 128
    salted = two.fleet.ask(messages=talks[0], max_tokens=1, cache_salt="mine").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = two.fleet.ask(messages=talks[0], max_tokens=1, cache_salt="mine").json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


def test_load_and_capacity_are_told(two: Two) -> None:
    two.fleet.chat("Hi")
    for text in two.metrics():
        assert figure(text, "dynamo_component_total_blocks") == 100
        assert figure(text, "dsv4_core_pages") == 100
        assert "dsv4_http_responses" not in text and "dsv4_connections" not in text
    assert two.sum("dsv4_generation_tokens_total") > 0
    stream = two.fleet.stream(**ENDLESS)
    next(stream)
    until(lambda: two.sum("dynamo_component_gpu_cache_usage_percent") > 0)
    stream.close()
    until(lambda: two.sum("dynamo_component_gpu_cache_usage_percent") == 0)


def test_a_client_that_goes_away_ends_its_request(two: Two) -> None:
    before = two.sum("dsv4_core_aborts_total")
    stream = two.fleet.stream(**{**ENDLESS, "max_tokens": 3000})
    for _ in range(3):
        next(stream)
    assert two.sum("vllm:num_requests_running") == 1
    stream.close()
    until(lambda: two.sum("vllm:num_requests_running") == 0)
    assert two.sum("dsv4_core_aborts_total") == before + 1


def test_sigterm_lets_streams_end(tmp_path: Path) -> None:
    with fleet(tmp_path) as alone:
        alone.frontend(*KV)
        worker = alone.worker("a")
        events = []
        for event in alone.stream(**ENDLESS, stream_options={"include_usage": True}):
            events.append(event)
            if len(events) == 5:
                worker.send(signal.SIGTERM)
        assert events[-1]["usage"]["completion_tokens"] == 200
        assert worker.wait() == 0, worker.text[-4000:]
        assert "Traceback" not in worker.text
        until(lambda: alone.ask(messages=HELLO).status_code in (404, 503))


def test_an_engine_that_is_lost_is_an_error_and_comes_back(tmp_path: Path) -> None:
    """Its cache is gone, and the router is told so: the same prompt then meets no prefix."""
    long = [{"role": "user", "content": "word " * 300}]
    with fleet(tmp_path) as alone:
        alone.frontend(*KV)
        worker = alone.worker("a")
        assert alone.ask(messages=long, max_tokens=1).status_code == 200
        until(lambda: alone.ask(messages=long, max_tokens=1).status_code == 200 and overlaps(alone)[-1] >= 2)
        events = []
        for event in alone.stream(**ENDLESS):
            events.append(event)
            if len(events) == 5:
                [engine] = children(worker.pid)
                os.kill(engine, signal.SIGKILL)
        assert events[-1]["error"]["code"] == 503
        until(lambda: alone.ask(messages=HELLO, max_tokens=1).status_code == 200, worker)
        until(lambda: alone.ask(messages=[*HELLO, *long], max_tokens=1).status_code == 200, worker)
        answer = alone.ask(messages=long, max_tokens=1).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert overlaps(alone)[-1] == 0


@pytest.mark.parametrize("limit", [0, 3])
def test_kill_in_mid_stream(tmp_path: Path, limit: int) -> None:
    """Without migration it is an error in the stream; with it the stream goes on at the other worker, with equal tokens."""
    with fleet(tmp_path) as pair:
        pair.frontend(*KV, "--migration-limit", str(limit))
        workers = {w.instance: w for w in (pair.worker("a"), pair.worker("b"))}
        expected = content(list(pair.stream(**ENDLESS)))
        events, killed = [], 0.0
        for event in pair.stream(**ENDLESS, nvext=WHERE):
            events.append(event)
            if len(events) == 5:
                killed = time.monotonic()
                workers[worker_of(events[0])].kill()
        took = time.monotonic() - killed
        if limit:
            assert content(events) == expected
            assert events[-1]["choices"][0]["finish_reason"] == "length"
        else:
            assert events[-1]["error"]["code"] == 503 and len(content(events)) < len(expected)
            assert took < 1, f"it took {took:.1f} s"
        until(lambda: pair.ask(messages=HELLO).status_code == 200)


def overlaps(of: Fleet) -> list[int]:
    """Blocks of a prefix that the router found at the worker it chose, of each request so far."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", of.log())
    return [int(n) for n in re.findall(r"overlap_blocks=(\d+)", log)]
