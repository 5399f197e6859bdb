"""Anthropic's dialect over HTTP: what its clients send, and what they get, whole and streamed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.api.anthropic import closed
from dsv4.text.tokenizer import Tokenizer

from tests.support.events import anthropic_message, events_of
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running
from tests.text.damage import shapes

HTTP = httpx.Client(timeout=60)
"""One for all: to make one takes longer than a request."""

TOOLS = [
    {
        "name": "get_weather",
        "description": "Weather of a city.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
    {"name": "sh", "input_schema": {"type": "object", "properties": {"cmd": {"type": "string"}}}},
]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
    'Seoul "5"</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
HELLO = [{"role": "user", "content": "Hi"}]


class Model:
    """A server whose model says what it is told to."""

    def __init__(self, server: RunningServer, tokenizer: Tokenizer) -> None:
        self.server, self.tokenizer, self.url = server, tokenizer, server.url + "/v1/messages"

    def post(self, **body: Any) -> httpx.Response:
        request = {"model": "default", "max_tokens": 500, "messages": HELLO} | body
        return HTTP.post(self.url, json={k: v for k, v in request.items() if v is not None})

    def says(self, text: str, **body: Any) -> dict[str, Any]:
        """The whole message; a stream says the same."""
        self.server.engine.script = lambda prompt: text
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        stream = self.post(**body, stream=True)
        assert stream.headers["content-type"].startswith("text/event-stream")
        streamed = anthropic_message(stream.text)
        for block in streamed["content"]:
            if block["type"] == "tool_use":
                block["input"] = closed(block["input"])
        assert plain(streamed) == plain(whole), stream.text
        return whole

    def prompt(self) -> str:
        """What the model read last."""
        return self.tokenizer.decode(self.server.engine.seen[-1].prompt, skip_special=False)

    def reads(self, **body: Any) -> str:
        self.server.engine.script = lambda prompt: "ok"
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return self.prompt()

    def refuses(self, **body: Any) -> str:
        answer = self.post(**body)
        assert answer.status_code == 400, answer.text
        error = answer.json()
        assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
        assert error["request_id"] == answer.headers["x-request-id"]
        assert "\n" not in error["error"]["message"]
        return error["error"]["message"]


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs from request to request."""
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {k: v for k, v in message.items() if k != "id"} | {"content": content}


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Iterator[Model]:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield Model(server, tokenizer)


def test_a_message(model: Model) -> None:
    model.server.engine.cached_tokens = 3
    try:
        got = model.says("Hello there.")
    finally:
        model.server.engine.cached_tokens = 0
    assert got["id"].startswith("msg_") and (got["type"], got["role"], got["model"]) == (
        "message",
        "assistant",
        "tiny",
    )
    assert got["content"] == [{"type": "text", "text": "Hello there."}]
    assert (got["stop_reason"], got["stop_sequence"]) == ("end_turn", None)
    prompt = len(model.server.engine.seen[-1].prompt)
    usage = got["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (prompt - 3, 3)
    assert usage["cache_creation_input_tokens"] == 0 and usage["output_tokens"] > 1


def test_thoughts_text_and_a_call(model: Model) -> None:
    got = model.says(f"Hm. Weather?</think>Let me look.{CALL}", tools=TOOLS, **THINK)
    thinking, text, use = got["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Hm. Weather?") and thinking["signature"]
    assert text == {"type": "text", "text": "Let me look."}
    assert (use["type"], use["name"], use["input"]) == (
        "tool_use",
        "get_weather",
        {"city": 'Seoul "5"', "days": 3},
    )
    assert use["id"].startswith("toolu_") and got["stop_reason"] == "tool_use"


def test_a_tool_loop_comes_back_as_the_model_wrote_it(model: Model) -> None:
    said = f"Hm.</think>Let me look.{CALL}"
    got = model.says(said, tools=TOOLS, **THINK)
    before = model.prompt()
    use = got["content"][-1]["id"]
    result = {"type": "tool_result", "tool_use_id": use, "content": [{"type": "text", "text": "sunny"}]}
    talk = [*HELLO, {"role": "assistant", "content": got["content"]}, {"role": "user", "content": [result]}]
    after = model.reads(messages=talk, tools=TOOLS, **THINK)
    turn = "<｜end▁of▁sentence｜><｜User｜><tool_result>sunny</tool_result><｜Assistant｜><think>"
    assert after == before + said + turn


def test_thoughts_that_are_not_to_be_shown_come_back_in_their_signature(model: Model) -> None:
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    got = model.says(f"Secret — é.</think>Sure.{CALL}", tools=TOOLS, **hidden)
    assert got["content"][0]["thinking"] == "" and "Secret" not in json.dumps(got)
    result = {"type": "tool_result", "tool_use_id": got["content"][-1]["id"], "content": "sunny"}
    talk = [*HELLO, {"role": "assistant", "content": got["content"]}, {"role": "user", "content": [result]}]
    assert "<think>Secret — é.</think>Sure." in model.reads(messages=talk, tools=TOOLS, **hidden)


def test_stop_sequences_and_lengths(model: Model) -> None:
    got = model.says("one two three", stop_sequences=["two"])
    assert (got["content"][0]["text"], got["stop_reason"], got["stop_sequence"]) == (
        "one ",
        "stop_sequence",
        "two",
    )
    assert model.says("one two three", max_tokens=1)["stop_reason"] == "max_tokens"
    assert model.says("")["content"] == []
    seen = []
    for most in range(1, len(model.tokenizer.encode(CALL)) + 1):
        got = model.says(CALL, tools=TOOLS, max_tokens=most)
        assert got["stop_reason"] == "max_tokens" and "｜DSML｜" not in json.dumps(
            got["content"], ensure_ascii=False
        )
        seen += [block["input"] for block in got["content"] if block["type"] == "tool_use"]
    assert {"city": "Seoul"} in seen and seen[-1] == {"city": 'Seoul "5"', "days": 3}


def test_streamed_is_whole_whatever_models_write(model: Model) -> None:
    for text in random.Random(7).sample(shapes(), 25):
        for more in ({}, THINK):
            got = model.says(text, tools=TOOLS, **more)
            assert "｜DSML｜" not in json.dumps(got["content"], ensure_ascii=False)
            called = any(block["type"] == "tool_use" for block in got["content"])
            assert got["stop_reason"] == ("tool_use" if called else "end_turn")


def test_system_prompts_and_system_messages(model: Model) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.330; cch=0a1b2;"
    blocks = [
        {"type": "text", "text": line},
        {"type": "text", "text": "You are C.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "Be short."},
    ]
    start = "<｜begin▁of▁sentence｜>You are C.\n\nBe short.<｜User｜>Hi"
    assert model.reads(system=blocks).startswith(start)
    assert model.server.engine.seen[-1].routing.ttl == 3600
    assert model.reads(system=f"{line}\nYou are C.\n\nBe short.").startswith(start)
    assert model.reads(system=f"About {line}").startswith(f"<｜begin▁of▁sentence｜>About {line}<｜User｜>")
    talk = [*HELLO, {"role": "system", "content": "New rule."}, {"role": "user", "content": "Go"}]
    assert "<｜User｜>Hi\n\nNew rule.<｜User｜>Go" in model.reads(messages=talk)


def test_the_billing_line_is_left_out_of_chats_as_well(model: Model) -> None:
    for content in (
        "x-anthropic-billing-header: a=1;\nBe C.",
        [{"type": "text", "text": "x-anthropic-billing-header: b"}],
    ):
        talk = [{"role": "system", "content": content}, *HELLO]
        body = {"model": "default", "messages": talk}
        assert HTTP.post(model.server.url + "/v1/chat/completions", json=body).status_code == 200
        assert "billing" not in model.prompt()


def test_fields_and_betas_that_nobody_knows_are_tolerated(model: Model) -> None:
    answer = HTTP.post(
        model.url + "?beta=true",
        headers={"anthropic-beta": "a-2025-01-01,odd-2031-12-12", "anthropic-version": "2099-01-01"},
        json={
            "model": "default",
            "max_tokens": 10,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "odd": 1}], "odd": {}}],
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "thinking": {"type": "adaptive", "display": "summarized"},
            "tools": [{**TOOLS[0], "defer_loading": True, "cache_control": {"type": "ephemeral"}}],
            "service_tier": "auto",
            "container": None,
            "odd": [1],
        },
    )
    assert answer.status_code == 200 and "x-dsv4-warning" not in answer.headers
    assert model.server.engine.seen[-1].reading.thinking


def test_tools_of_anthropic_itself_are_left_out_with_a_warning(model: Model) -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    for stream in (False, True):
        answer = model.post(tools=[hosted, *TOOLS], stream=stream)
        assert answer.headers["x-dsv4-warning"].startswith("tool 'web_search' of type 'web_search_20250305'")
        assert "web_search" not in model.prompt() and "get_weather" in model.prompt()


def test_tool_choice(model: Model) -> None:
    assert "get_weather" in model.reads(tools=TOOLS, tool_choice={"type": "auto"})
    assert "get_weather" not in model.reads(tools=TOOLS, tool_choice={"type": "none"})
    one = {"type": "auto", "disable_parallel_tool_use": True}
    twice = CALL.replace("\n</｜DSML｜tool_calls>", "") + CALL.replace("\n\n<｜DSML｜tool_calls>", "")
    assert [b["type"] for b in model.says(twice, tools=TOOLS)["content"]] == ["tool_use"] * 2
    assert [b["type"] for b in model.says(twice, tools=TOOLS, tool_choice=one)["content"]] == ["tool_use"]


def test_an_assistants_message_at_the_end_is_continued(model: Model) -> None:
    talk = [*HELLO, {"role": "assistant", "content": "Sure, "}]
    assert model.reads(messages=talk).endswith("<｜Assistant｜></think>Sure, ")
    split = [*HELLO, {"role": "assistant", "content": "Su"}, {"role": "assistant", "content": "re, "}]
    assert model.reads(messages=split).endswith("<｜Assistant｜></think>Sure, ")


def test_who_asks(model: Model) -> None:
    def routing(headers: dict[str, str] | None = None, **body: Any) -> Any:
        request = {"model": "default", "max_tokens": 5, "messages": HELLO} | body
        assert HTTP.post(model.url, json=request, headers=headers or {}).status_code == 200
        return model.server.engine.seen[-1].routing

    assert routing(metadata={"user_id": "u1"}).tenant == "u1"
    got = routing(metadata={"user_id": "user_ab_account__session_0f-1"})
    assert (got.tenant, got.session) == ("user_ab_account_", "0f-1")
    got = routing(metadata={"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": "s"})})
    assert (got.tenant, got.session) == ("d", "s")
    got = routing({"x-claude-code-session-id": "h", "x-dsv4-tenant": "t"}, metadata={"user_id": "{not json"})
    assert (got.tenant, got.session) == ("t", "h")


def test_sampling_parameters_arrive(model: Model) -> None:
    model.reads(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["x"])
    p = model.server.engine.seen[-1].params
    assert (p.temperature, p.top_p, p.top_k, p.stop, p.max_tokens) == (0.5, 0.9, 7, ("x",), 500)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"content": "Hi"}]}, r"messages[0].role is missing"),
        (
            {"messages": [{"role": "tool", "content": "Hi"}]},
            "messages[0].role is 'tool'; it takes one of user, assistant",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is 5; it takes text or a list"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0] is 'a'"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "messages[0].content[0].type is missing",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}
                ]
            },
            "messages[0].content[0].type is 'image'; this model reads text only",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "sh", "input": {}}],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}
                        ],
                    },
                ]
            },
            "messages[2].content[0].content[0].type is 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id is",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "x"}],
                    }
                ]
            },
            "messages[0].content[0].input is 'x'; it takes an object",
        ),
        (
            {"tool_choice": {"type": "any"}},
            "tool_choice.type asks for a call, but there are no tools",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "sl"}},
            "tool_choice.name is 'sl'; it takes the name of",
        ),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": 7}}},
            "output_config.format.schema is 7",
        ),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is a list"),
        ({"max_tokens": 0}, "max_tokens is 0; it takes a whole number from 1"),
        ({"thinking": {"type": "on"}}, "thinking.type is 'on'; it takes one of enabled, adaptive, disabled"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort is 'huge'"),
        ({"stop_sequences": ["x", ""]}, "stop_sequences[1] is ''; it takes text of 1 to 1024 characters"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences is a list of 17; it takes at most 16 items"),
        ({"stop_sequences": "x"}, "stop_sequences is 'x'"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_refusals(model: Model, body: dict[str, Any], says: str) -> None:
    assert says in model.refuses(**body)
    assert says in model.refuses(**body, stream=True)


def test_a_prompt_that_does_not_fit_says_so_in_claude_codes_words(model: Model) -> None:
    for words in (5000, 200000):
        long = [{"role": "user", "content": "word " * words}]
        assert model.refuses(messages=long).startswith("prompt is too long: ")


def test_tokens_are_counted_as_the_same_request_reads_them(model: Model) -> None:
    body = {"model": "default", "system": "S", "messages": HELLO, "tools": TOOLS, **THINK}
    model.reads(**body)
    counted = HTTP.post(model.url + "/count_tokens", json=body)
    assert counted.json() == {"input_tokens": len(model.server.engine.seen[-1].prompt)}


def test_errors_have_anthropics_shape(model: Model, tokenizer: Tokenizer) -> None:
    def kind(answer: httpx.Response) -> tuple[int, str]:
        assert answer.json()["type"] == "error"
        return answer.status_code, answer.json()["error"]["type"]

    ask = {"model": "default", "max_tokens": 5, "messages": HELLO}
    assert kind(model.post(model="claude-x")) == (404, "not_found_error")
    assert kind(HTTP.post(model.url, content=b"{")) == (400, "invalid_request_error")
    assert kind(HTTP.get(model.url)) == (405, "invalid_request_error")
    known = {"anthropic-version": "2023-06-01"}
    assert kind(HTTP.get(model.server.url + "/v1/none", headers=known)) == (404, "not_found_error")
    with running(FakeEngine(tokenizer=tokenizer, max_live=0)) as server:
        for stream in (False, True):
            full = HTTP.post(server.url + "/v1/messages", json=ask | {"stream": stream})
            assert kind(full) == (429, "rate_limit_error") and full.headers["retry-after"] == "1"
    with running(FakeEngine(tokenizer=tokenizer), api_key="secret") as server:
        url = server.url + "/v1/messages"
        assert kind(HTTP.post(url, json=ask)) == (401, "authentication_error")
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert HTTP.post(url, json=ask, headers=headers).status_code == 200
    with running(FakeEngine(tokenizer=tokenizer, fail_after=2)) as server:
        url = server.url + "/v1/messages"
        assert kind(HTTP.post(url, json=ask)) == (500, "api_error")
        last = events_of(HTTP.post(url, json=ask | {"stream": True}).text)[-1]
        assert (
            last["type"] == "error"
            and last["error"]["type"] == "api_error"
            and "boom" in last["error"]["message"]
        )
