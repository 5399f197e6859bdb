"""`dsv4 serve` as a user starts it, driven by the unmodified `openai` package."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.record_golden import WEATHER
from tests.support.checkpoints import write_random

BASE = ["--num-pages", "200", "--max-num-seqs", "16", "--block-size", "128", "--allow-dump"]


class Serving:
    """A running server process."""

    def __init__(self, *args: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [sys.executable, "-m", "dsv4.cli", "serve", *args, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        for _ in range(900):  # on a GPU kernels are compiled first
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.2)
        raise AssertionError("the server did not start in 180 s")

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith(name)).rsplit(" ", 1)[1])

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and everything printed."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


@pytest.fixture(scope="module")
def nano() -> Iterator[Serving]:
    serving = Serving(*BASE)
    yield serving
    code, out = serving.stop()
    assert code == 0 and "Traceback" not in out, out
    for word in ("weights", "pool", "capacity", "snapshots", "dtype"):
        assert word in out, f"the start-up plan says nothing of {word}"
    assert re.search(
        r"POST /v1/chat/completions 200 reason=stop client=\S+ prompt_tokens=\d+ .*tokens_per_s=", out
    )
    assert " 200 reason=client_gone " in out and "quick brown fox" not in out and " /health " not in out


def ask(nano: Serving, text: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return nano.client.chat.completions.create(model="default", messages=messages, temperature=0, **options)


def test_streaming_equals_not_streaming(nano: Serving) -> None:
    whole = ask(nano, "Who are you?")
    text, usage = "", None
    for chunk in ask(nano, "Who are you?", stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content and text.startswith("I am Nano, a tiny language model")
    assert whole.choices[0].finish_reason == "stop"
    assert usage.completion_tokens == whole.usage.completion_tokens


Answer = tuple[str, list[tuple[str, str]], str | None]
"""Text, names and arguments of calls, and why it ended."""


def whole(create: Callable[..., Any], seed: int) -> Answer:
    choice = create(seed=seed).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
    return choice.message.content or "", calls, choice.finish_reason


def streamed(create: Callable[..., Any], seed: int) -> Answer:
    text, calls, reason = "", list[list[str]](), None
    for chunk in create(seed=seed, stream=True):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        text += delta.content or ""
        for call in delta.tool_calls or ():
            if call.function.name:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
    return text, [(name, arguments) for name, arguments in calls], reason


@pytest.mark.parametrize(
    "form",
    [
        {"tool_choice": "required", "tools": [WEATHER]},
        {"tools": [WEATHER]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": WEATHER["function"]["parameters"]}}},
    ],
    ids=["required", "auto", "schema"],
)  # fmt: skip
def test_an_answer_with_a_form_is_streamed_as_it_is_whole(nano: Serving, form: dict[str, Any]) -> None:
    """At temperature 1. On the CPU all at once, as answers do not depend there on what runs beside them."""
    messages = [{"role": "user", "content": "Is it warm there?"}]
    options = {"model": "default", "messages": messages, "temperature": 1, "max_tokens": 80, **form}
    create = partial(nano.client.chat.completions.create, **options)
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else 6) as pool:
        asked = [(pool.submit(whole, create, seed), pool.submit(streamed, create, seed)) for seed in range(3)]
    for one, other in asked:
        assert one.result() == other.result()
        text, calls, reason = one.result()
        if reason == "tool_calls":
            assert all(name == "get_weather" and type(json.loads(body)) is dict for name, body in calls)
        elif reason == "stop" and "response_format" in form:
            assert type(json.loads(text)) is dict
        assert reason != "stop" or "tool_choice" not in form


def test_a_tool_call_and_its_result(nano: Serving) -> None:
    first = ask(nano, "What is the weather in Prague?", tools=[WEATHER])
    call = first.choices[0].message.tool_calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Prague"}')


def test_the_second_request_says_what_it_reused(nano: Serving) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    ask(nano, text, max_tokens=1)
    usage = ask(nano, text, max_tokens=1).usage
    details = usage.prompt_tokens_details
    assert details.cached_tokens >= 256
    assert details.model_extra["dsv4"]["history_matched"] >= details.cached_tokens


def test_a_conversation_in_anthropics_dialect_computes_its_new_text_alone(nano: Serving) -> None:
    """Sampled at a high temperature, so that tokens and calls are such as no encoder writes."""
    weather = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "What is the weather in Prague? " + "Tell me. " * 100}
    ]
    stored, kinds = 0, set()
    for turn in range(4):
        body = {
            "model": "default",
            "max_tokens": 48,
            "messages": talk,
            "tools": [weather],
            "temperature": 1.5,
        }
        body["seed"] = turn
        answer = httpx.post(f"{nano.url}/v1/messages", json=body, timeout=120).json()
        usage, content = answer["usage"], answer["content"]
        assert usage["cache_read_input_tokens"] >= stored // 128 * 128, (turn, usage)
        whole = answer["stop_reason"] != "max_tokens" or {b["type"] for b in content} == {"text"}
        kinds |= {b["type"] for b in content}
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        stored = prompt + usage["output_tokens"] - 1 if whole else prompt - 1
        talk.append({"role": "assistant", "content": content})
        calls = [b["id"] for b in content if b["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": id, "content": "sunny"} for id in calls]
        talk.append({"role": "user", "content": results or "And in Rome?"})
    assert "text" in kinds


def test_prompt_logprobs_as_an_evaluation_asks_for_them(nano: Serving) -> None:
    prompt = [0, 3, 500, 600, 700, 4, 6]
    answer = nano.client.completions.create(
        model="default", prompt=prompt, echo=True, logprobs=1, max_tokens=1
    )
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert len(logprobs) == len(prompt) + 1 and logprobs[0] is None and all(x < 0 for x in logprobs[1:])


def test_a_dump_of_the_server_runs_on_in_the_simulator(nano: Serving, tmp_path: Path) -> None:
    """Taken while an answer is being streamed: the simulator ends that answer, and reuses what the server had stored."""
    prompt = [3 + i % 500 for i in range(600)]
    nano.client.completions.create(model="default", prompt=prompt, max_tokens=1)
    stream = nano.client.completions.create(
        model="default", prompt=prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    answer = httpx.get(f"{nano.url}/dump")
    stream.close()
    assert answer.status_code == 200, answer.text
    path = tmp_path / "core.json"
    path.write_bytes(answer.content)
    options = ["--model", str(resources.files("dsv4") / "data" / "nano"), "--block-size", "128", "--json"]
    rows, index = ("fp8_ds_mla", "mxfp4") if torch.cuda.is_available() else ("float32", "float32")
    formats = ["--kv-cache-dtype", rows, "--index-cache-dtype", index]
    command = [sys.executable, "-m", "dsv4.cli", "simulate", "--dump", str(path), *options, *formats]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)["policies"]["dump"]
    assert report["finished"] == report["requests"] == 1 and report["pool"]["pages"] == 200
    assert 0 < report["tokens"]["output"] < 400 and report["tokens"]["matched"] >= 512


def test_pinned_pages_are_used_pages(nano: Serving) -> None:
    usage = "vllm:kv_cache_usage_perc"
    assert nano.gauge(usage) == nano.gauge("dsv4_core_pinned_pages") == 0
    pin = httpx.post(f"{nano.url}/v1/prefixes", json={"prompt": [3 + i % 500 for i in range(600)]}).json()[
        "id"
    ]
    pinned = nano.gauge("dsv4_core_pinned_pages")
    assert pinned > 0 and nano.gauge(usage) == pytest.approx(pinned / 200)
    httpx.delete(f"{nano.url}/v1/prefixes/{pin}")
    assert nano.gauge(usage) == nano.gauge("dsv4_core_pinned_pages") == 0


def test_the_times_of_a_request_add_up(nano: Serving) -> None:
    def seconds(name: str) -> float:
        return nano.gauge(f"vllm:{name}_seconds_sum")

    names = ("request_queue_time", "request_prefill_time", "request_decode_time", "e2e_request_latency")
    before = [seconds(name) for name in names]
    began = time.monotonic()
    ask(nano, "Who are you?", max_tokens=8)
    took = time.monotonic() - began
    queued, prefill, decode, whole = (seconds(n) - b for n, b in zip(names, before, strict=True))
    assert queued >= 0 and prefill > 0 and decode > 0
    assert queued + prefill + decode <= whole <= took


def test_64_streams_with_a_third_cut_off_leave_nothing_behind(nano: Serving) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        messages = [{"role": "user", "content": f"Count to ten. {i}"}]
        stream = await client.chat.completions.create(
            model="default",
            messages=messages,
            stream=True,
            max_tokens=16 if i % 3 else 400,  # so that it goes on when it is cut off
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        seen = 0
        async for chunk in stream:
            seen += bool(chunk.choices and chunk.choices[0].delta.content)
            if i % 3 == 0 and seen == 2:
                await stream.close()
                return "cut"
            if chunk.choices and chunk.choices[0].finish_reason:
                return chunk.choices[0].finish_reason
        return "no end"

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    ends = asyncio.run(all_of_them())
    assert ends.count("cut") == 22 and ends.count("length") == 42
    deadline = time.monotonic() + 60
    while nano.gauge("dsv4_core_free_slabs") < 16 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert nano.gauge("dsv4_core_free_slabs") == 16
    assert nano.gauge("dsv4_core_available_pages") == nano.gauge("dsv4_core_pages") == 200
    assert nano.gauge("dsv4_core_running") == nano.gauge("dsv4_core_waiting") == 0


def test_a_directory_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    write_random(tmp_path / "tiny", "flash", compress_ratios=[0, 4, 128])
    serving = Serving(
        str(tmp_path / "tiny"), "--num-pages", "20", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"
    )
    try:
        answer = serving.client.completions.create(
            model="tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0
        )
        assert answer.usage.completion_tokens == 4 or answer.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="tokenizer"):
            serving.client.completions.create(model="tiny", prompt="text", max_tokens=4)
        with pytest.raises(openai.NotFoundError, match="tiny"):
            serving.client.completions.create(model="other", prompt=[5], max_tokens=4)
    finally:
        code, _ = serving.stop()
    assert code == 0
