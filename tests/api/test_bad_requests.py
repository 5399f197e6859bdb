"""Whatever is sent, the answer is a 4xx in OpenAI's shape with one clear line: never a 5xx, a traceback or a
dead server."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4 import EngineConfig
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
COMPLETION = {"model": "default", "prompt": "Hi", "max_tokens": 1}

NUMERIC = (
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "priority",
)
OTHER = (
    "model",
    "messages",
    "prompt",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "stream",
    "stream_options",
    "echo",
    "tools",
    "tool_choice",
    "thinking",
    "reasoning_effort",
    "chat_template_kwargs",
    "response_format",
    "cache_salt",
    "suffix",
    "ignore_eos",
    "skip_special_tokens",
    "return_token_ids",
    "user",
)
VALUES = (
    b"-9223372036854775808",
    b"-1",
    b"0",
    b"1",
    b"2147483648",
    b"9223372036854775808",
    b"1e308",
    b"1e999",
    b"NaN",
    b"0.5",
    b'"1"',
    b'"' + b"x" * 5000 + b'"',
    b"null",
    b"[]",
    b"{}",
    b"true",
    b"[[]]",
    b'[{"a": 1}]',
    b'{"type": 3}',
    b"[1e30]",
)


@pytest.fixture(scope="module")
def http(served: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers={"content-type": "application/json"}) as client:
        yield client


def check_refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of a 4xx, whose form is checked."""
    assert 400 <= response.status_code < 500, f"{response.status_code}: {response.text[:300]}"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] and error["type"]
    assert 10 < len(error["message"]) < 400 and "\n" not in error["message"]
    assert "Traceback" not in response.text and "Error" not in error["message"]
    return error


@pytest.mark.parametrize("field", [*NUMERIC, *OTHER])
@pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_every_field_with_every_bad_value(http: httpx.Client, path: str, base: dict, field: str) -> None:
    import orjson

    rest = orjson.dumps({k: v for k, v in base.items() if k != field})[1:]
    for value in VALUES:
        began = time.perf_counter()
        response = http.post(path, content=b'{"%b":%b,%b' % (field.encode(), value, rest))
        assert response.status_code < 500, (value, response.text)
        if response.status_code >= 400:
            check_refusal(response)
            assert time.perf_counter() - began < 20
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        ("chat", {"temperature": 2.1}, "temperature", ["2.1", "0 to 2", "the nearest is 2"]),
        ("chat", {"top_k": -2}, "top_k", ["-2", "the nearest is -1"]),
        ("chat", {"stop": ""}, "stop", ["''", "text of 1 to 1024 characters"]),
        ("chat", {"stop": ["a", "x" * 2000]}, "stop[1]", ["xx…", "text of 1 to 1024 characters"]),
        ("chat", {"top_p": 0}, "top_p", ["0", "above 0"]),
        ("chat", {"n": 129}, "n", ["129", "1 to 128", "nearest is 128"]),
        ("chat", {"n": "2"}, "n", ["'2'", "whole number"]),
        ("chat", {"max_tokens": -5}, "max_tokens", ["-5", "nearest is 0"]),
        ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs", ["21", "0 to 20", "20"]),
        ("chat", {"top_logprobs": 2}, "top_logprobs", ["logprobs"]),
        ("chat", {"messages": []}, "messages", ["empty"]),
        ("chat", {"messages": None}, "messages", ["missing"]),
        ("chat", {"messages": ["x"]}, "messages[0]", ["'x'", "an object"]),
        (
            "chat",
            {"messages": [{"role": "usr", "content": "x"}]},
            "messages[0].role",
            ["usr", "user", "did you mean"],
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            ["image_url", "text"],
        ),
        (
            "chat",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            ["3", "JSON object"],
        ),
        ("chat", {"messages": [None]}, "messages[0]", ["null", "an object"]),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content", ["null", "text"]),
        ("chat", {"messages": [{"role": "user", "content": 3.5}]}, "messages[0].content", ["a number"]),
        ("chat", {"messages": [{"role": "user", "content": [None]}]}, "messages[0].content[0]", ["null"]),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages[0].content[0].text",
            ["null", "text"],
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ["x"]}]}]},
            "messages[0].content[0].text",
            ["a list", "text"],
        ),
        ("chat", {"messages": [{"role": None, "content": "x"}]}, "messages[0].role", ["null", "valid are"]),
        ("chat", {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", ["a list of 1"]),
        (
            "chat",
            {"messages": [{"role": "assistant", "tool_calls": [None]}]},
            "messages[0].tool_calls[0]",
            ["null", "an object"],
        ),
        (
            "chat",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": None}]}]},
            "messages[0].tool_calls[0].function.name",
            ["missing"],
        ),
        ("chat", {"messages": [{"role": "tool", "content": {}}]}, "messages[0].content", ["an object"]),
        ("chat", {"tools": [None]}, "tools[0]", ["null", "an object"]),
        ("chat", {"tools": {}}, "tools", ["an object of 0", "a list"]),
        ("chat", {"tools": [{"function": []}]}, "tools[0].function", ["a list of 0", "an object"]),
        ("chat", {"tools": [{"function": {"name": True}}]}, "tools[0].function.name", ["true", "text"]),
        ("chat", {"tools": [{"function": {}}]}, "tools[0].function.name", ["missing"]),
        (
            "chat",
            {"tools": [{"function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
            ["a list of 0", "an object"],
        ),
        (
            "chat",
            {"tools": [{"function": {"name": "f", "strict": "yes"}}]},
            "tools[0].function.strict",
            ["'yes'", "true or false"],
        ),
        (
            "chat",
            {"messages": [{"role": "system", "content": "x", "tools": [{"function": None}]}]},
            "messages[0].tools[0]",
            ["null", "an object"],
        ),
        ("chat", {"logit_bias": {"1": None}}, "logit_bias", ["null", "-100 to 100"]),
        ("chat", {"logit_bias": {"1": "x" * 5000}}, "logit_bias", ["xxx…'", "-100 to 100"]),
        ("chat", {"temperature": True}, "temperature", ["true", "a number"]),
        ("chat", {"tool_choice": "required"}, "tool_choice", ["call", "no tools"]),
        ("chat", {"tool_choice": {"type": "function"}}, "tool_choice.name", ["missing"]),
        ("chat", {"tools": [{"type": "web_search"}]}, "tools[0].type", ["web_search", "function"]),
        ("chat", {"reasoning_effort": "hihg"}, "reasoning_effort", ["hihg", "did you mean 'high'"]),
        ("chat", {"thinking": {"type": "on"}}, "thinking.type", ["on", "enabled"]),
        (
            "chat",
            {"response_format": {"type": "xml"}},
            "response_format.type",
            ["json_object", "text"],
        ),
        ("chat", {"response_format": {"schema": {}}}, "response_format.type", ["missing", "text"]),
        ("chat", {"logit_bias": {"a": 1}}, "logit_bias", ["token ids"]),
        ("chat", {"logit_bias": {"1": 500}}, "logit_bias", ["500", "-100 to 100"]),
        ("chat", {"stop": ["x"] * 17}, "stop", ["17", "16"]),
        ("completions", {"prompt": None}, "prompt", ["missing"]),
        ("completions", {"prompt": ""}, "prompt", ["empty"]),
        ("completions", {"prompt": []}, "prompt", ["1 to"]),
        ("completions", {"prompt": [1, "a"]}, "prompt[1]", ["token ids", "text"]),
        ("completions", {"prompt": [1.5, 2]}, "prompt[0]", ["1.5", "token ids", "whole"]),
        ("completions", {"prompt": [8e9]}, "prompt[0]", ["8000000000", "0 to 8191"]),
        ("completions", {"prompt": [8192]}, "prompt[0]", ["8192", "0 to 8191"]),
        ("completions", {"prompt": ["a"] * 1000, "n": 100}, "n", ["1000", "100", "at most 1024"]),
        ("completions", {"best_of": 3}, "best_of", ["3", "1"]),
        ("completions", {"echo": True, "logprobs": 1, "stream": True}, "stream", ["echo", "stream false"]),
    ],
)
def test_messages_name_field_value_and_choice(
    http: httpx.Client, path: str, change: dict, param: str, words: list[str]
) -> None:
    url, base = ("/v1/chat/completions", CHAT) if path == "chat" else ("/v1/completions", COMPLETION)
    error = check_refusal(http.post(url, json=base | change))
    assert error["param"] == param and all(w in error["message"] for w in words), error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "no valid JSON"),
        (b"[]", "a list"),
        (b"null", "null"),
        (b'"x"', "text"),
        (b"\xff\xfe", "no UTF-8"),
        (b'{"prompt": "\\ud800"}', "no valid JSON"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "128 levels"),
        (b'{"a":' + b"[" * 5000, "no valid JSON"),
        (b'{"prompt": "x", "a": ' + b"[" * 1000 + b"]" * 1000 + b"}", "128 levels"),
    ],
)
def test_bodies_that_are_no_object(http: httpx.Client, body: bytes, words: str) -> None:
    error = check_refusal(http.post("/v1/completions", content=body))
    assert error["code"] == "invalid_json" and words in error["message"]


def test_arguments_that_nest_too_deep_inside_their_text(http: httpx.Client) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
    assert http.post("/v1/chat/completions", json=CHAT | {"messages": messages}).status_code < 500


@pytest.mark.parametrize("tool", [[], "x", 3, None, {}])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_tools_of_a_message_that_are_none(http: httpx.Client, path: str, choice: Any, tool: Any) -> None:
    brought = {"role": "system", "content": "Hi", "tools": [tool]}
    answer = http.post(path, json={**CHAT, "messages": [brought, *CHAT["messages"]], "tool_choice": choice})
    assert answer.status_code == 400, answer.text
    check_refusal(answer)


def test_unknown_keys_are_tolerated(http: httpx.Client) -> None:
    for path, base in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        assert (
            http.post(path, json=base | {"store": False, "metadata": {"a": 1}, "x" * 300: []}).status_code
            == 200
        )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v1/%2e%2e/chat", 404),
    ],
)
def test_wrong_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    check_refusal(response)


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (
            gzip.compress(b"{}", mtime=0),
            {"content-encoding": "gzip"},
            415,
            ["content-encoding is 'gzip'", "unpacked"],
        ),
        (b"{}", {"content-encoding": "br"}, 415, ["content-encoding is 'br'"]),
        (b"{}", {"content-encoding": "identity"}, 400, ["messages"]),
        (gzip.compress(b"{}", mtime=0), {}, 400, ["no UTF-8", "0x8b at 1", "looks like gzip"]),
        ("{}".encode("utf-16"), {}, 400, ["no UTF-8", "0xff at 0", "looks like UTF-16"]),
        (b'{"a":"caf\xe9"}', {}, 400, ["no UTF-8", "0xe9 at 9"]),
        (b'{"a":"\xed\xa0\x80"}', {}, 400, ["no UTF-8", "0xed at 6"]),
        (b'{"a":"\xc0\xaf"}', {}, 400, ["no UTF-8", "0xc0 at 6"]),
        (b'{"a":"\xe2\x82', {}, 400, ["no UTF-8", "0xe2 at 6"]),
    ],
)
def test_a_body_that_is_no_plain_text(
    served: RunningServer, body: bytes, headers: dict, status: int, words: list[str]
) -> None:
    answer = httpx.post(served.url + "/v1/chat/completions", content=body, headers=headers)
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and all(w in message for w in words), message


def test_more_choices_than_the_queue_holds_are_no_matter_of_time(tokenizer: Tokenizer) -> None:
    """It was 429, to try again later."""
    engine = FakeEngine(tokenizer=tokenizer)
    engine.config = EngineConfig(max_num_waiting=2)
    with running(engine) as server, httpx.Client(base_url=server.url) as http:
        for path, base in (("chat/completions", CHAT), ("completions", COMPLETION)):
            assert http.post(f"/v1/{path}", json=base | {"n": 2}).status_code == 200
            error = check_refusal(http.post(f"/v1/{path}", json=base | {"n": 3}))
            assert error["param"] == "n" and "more than the queue holds; at most 2" in error["message"]
