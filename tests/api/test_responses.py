"""OpenAI's Responses API over HTTP: what Codex and the SDKs send, and what they get, whole and streamed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.events import events_of, openai_response
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running
from tests.text.damage import shapes

HTTP = httpx.Client(timeout=60)
"""One for all: to make one takes longer than a request."""

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
SPACE = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents.",
    "tools": [{"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}}],
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
SEARCH = {"type": "web_search", "external_web_access": True}
TOOLS = [WEATHER, SPACE, PATCH, SEARCH]
ENCRYPTED = {"include": ["reasoning.encrypted_content"]}


def invoke(name: str, **arguments: Any) -> str:
    parameters = "".join(
        f'<｜DSML｜parameter name="{k}" string="{"true" if isinstance(v, str) else "false"}">'
        f"{v if isinstance(v, str) else json.dumps(v)}</｜DSML｜parameter>\n"
        for k, v in arguments.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>\n'


def calls(*invokes: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(invokes)}</｜DSML｜tool_calls>"


class Model:
    """A server whose model says what it is told to."""

    def __init__(self, server: RunningServer, tokenizer: Tokenizer) -> None:
        self.server, self.tokenizer, self.url = server, tokenizer, server.url + "/v1/responses"

    def post(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        request = {"model": "default", "input": "Hi"} | body
        return HTTP.post(self.url, json={k: v for k, v in request.items() if v is not None}, headers=headers)

    def says(self, text: str, **body: Any) -> dict[str, Any]:
        """The whole response; a stream says the same."""
        self.server.engine.script = lambda prompt: text
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        stream = self.post(**body, stream=True)
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert plain(openai_response(stream.text)) == plain(answer.json())
        return answer.json()

    def reads(self, **body: Any) -> str:
        """What the model gets to read."""
        self.server.engine.script = lambda prompt: "ok"
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return self.prompt()

    def prompt(self) -> str:
        return self.tokenizer.decode(self.server.engine.seen[-1].prompt, skip_special=False)


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from request to request."""
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return {k: v for k, v in response.items() if k not in ("id", "created_at")} | {"output": output}


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Iterator[Model]:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield Model(server, tokenizer)


def test_a_response(model: Model) -> None:
    model.server.engine.cached_tokens = 3
    try:
        got = model.says("Hello there.", instructions="Be short.", metadata={"a": "b"})
    finally:
        model.server.engine.cached_tokens = 0
    assert model.prompt().startswith("<｜begin▁of▁sentence｜>Be short.<｜User｜>Hi")
    assert got["id"].startswith("resp_") and (got["object"], got["status"], got["model"]) == (
        "response",
        "completed",
        "tiny",
    )
    (item,) = got["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}
    ]
    assert (got["instructions"], got["metadata"], got["store"]) == ("Be short.", {"a": "b"}, False)
    usage, prompt = got["usage"], len(model.server.engine.seen[-1].prompt)
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (prompt, 3)
    assert usage["total_tokens"] == prompt + usage["output_tokens"]


def test_thoughts_text_and_calls(model: Model) -> None:
    text = f"Hm — é?</think>Let me look.{calls(invoke('get_weather', city='Seoul', days=3), invoke('agents__spawn'))}"
    got = model.says(text, tools=TOOLS, reasoning={"effort": "high"}, **ENCRYPTED)
    reasoning, message, call, spawn = got["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert (
        reasoning["content"] == [{"type": "reasoning_text", "text": "Hm — é?"}]
        and reasoning["encrypted_content"]
    )
    assert message["content"][0]["text"] == "Let me look."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Seoul", "days": 3},
    )
    assert (spawn["namespace"], spawn["name"], spawn["arguments"]) == ("agents", "spawn", "{}")
    assert call["call_id"] != spawn["call_id"] and "namespace" not in call
    assert got["usage"]["output_tokens_details"]["reasoning_tokens"] > 1
    assert len({item["id"] for item in got["output"]}) == 4


def test_a_custom_tool_takes_text(model: Model) -> None:
    patch = '*** Begin Patch\n+a "quoted" line\n*** End Patch'
    got = model.says(calls(invoke("apply_patch", input=patch)), tools=TOOLS)
    (item,) = got["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", patch)
    assert item["id"].startswith("ctc_")
    assert "follows this lark grammar" in model.prompt()


@pytest.mark.parametrize("keep", ["all", "encrypted"])
def test_a_tool_loop_comes_back_as_the_model_wrote_it(model: Model, keep: str) -> None:
    said = "Hm.</think>Let me look." + calls(invoke("agents__spawn"), invoke("apply_patch", input="p"))
    said = said.replace('invoke name="agents__spawn">\n', 'invoke name="agents__spawn">\n\n')
    more = {"tools": TOOLS, "reasoning": {"summary": "auto"}, **ENCRYPTED}
    got = model.says(said, **more)
    before, output = model.prompt(), got["output"]
    if keep == "encrypted":
        output[0].pop("content")
    results = [
        {"type": f"{kind}_output", "call_id": item["call_id"], "output": out}
        for kind, item, out in zip(
            ("function_call", "custom_tool_call"), output[2:], ("one", "two"), strict=True
        )
    ]
    results[1]["output"] = [{"type": "input_text", "text": "two"}]
    talk = [{"role": "user", "content": "Hi"}, *output, *reversed(results)]
    after = model.reads(input=talk, **more)
    tail = "<｜end▁of▁sentence｜><｜User｜><tool_result>one</tool_result>\n\n<tool_result>two</tool_result>"
    assert after == f"{before}{said}{tail}<｜Assistant｜><think>"


def test_a_length_that_cuts(model: Model) -> None:
    text = "Sure." + calls(
        invoke("get_weather", city='Seoul "5"', days=3), invoke("apply_patch", input='a "b"\nc')
    )
    for most in range(1, len(model.tokenizer.encode(text)) + 1):
        got = model.says(text, tools=TOOLS, max_output_tokens=most)
        assert got["status"] == "incomplete" and got["incomplete_details"] == {"reason": "max_output_tokens"}
        assert "｜DSML｜" not in json.dumps(got["output"], ensure_ascii=False)
        assert got["output"][-1]["status"] == "incomplete"
    assert model.says("", tools=TOOLS)["output"] == []


def test_streamed_is_whole_whatever_models_write(model: Model) -> None:
    for text in random.Random(9).sample(shapes(), 25):
        for more in ({}, {"reasoning": {"effort": "low"}}):
            got = model.says(text, tools=TOOLS, **more)
            said = [item["content"] for item in got["output"] if "content" in item]
            assert got["status"] == "completed" and "｜DSML｜" not in json.dumps(said, ensure_ascii=False)


def test_what_asks_for_thoughts(model: Model) -> None:
    for more, thinks in (
        ({}, False),
        ({"reasoning": {}}, False),
        ({"reasoning": {"effort": "medium"}}, True),
        ({"reasoning": {"summary": "auto"}}, True),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, False),
        (ENCRYPTED, True),
    ):
        assert model.reads(**more).endswith("<think>" if thinks else "</think>"), more


def test_what_is_hosted_is_left_out_with_a_warning(model: Model) -> None:
    talk = [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"role": "user", "content": "Hi"},
    ]
    for stream in (False, True):
        answer = model.post(tools=TOOLS, input=talk, stream=stream, text={"verbosity": "low"})
        warning = answer.headers["x-dsv4-warning"]
        assert "tools of type 'web_search' are hosted by OpenAI" in warning
        assert "input items of type 'web_search_call'" in warning and "text.verbosity" in warning
        assert "web_search" not in model.prompt() and "agents__spawn" in model.prompt()
    assert "x-dsv4-warning" not in model.post(tools=[WEATHER]).headers


def test_tool_choice_and_one_call_at_most(model: Model) -> None:
    assert "get_weather" not in model.reads(tools=TOOLS, tool_choice="none")
    two = calls(invoke("get_weather", city="a"), invoke("get_weather", city="b"))
    assert len(model.says(two, tools=TOOLS)["output"]) == 2
    assert len(model.says(two, tools=TOOLS, parallel_tool_calls=False)["output"]) == 1


def test_strict_tools_are_checked(model: Model) -> None:
    strict = {**WEATHER, "strict": True}
    assert "strict_error" not in model.says(calls(invoke("get_weather", days=3)), tools=[strict])
    assert "not of type" in model.says(calls(invoke("get_weather", days="x")), tools=[strict])["strict_error"]


def test_parameters_and_session_arrive(model: Model) -> None:
    model.reads(temperature=0.5, top_p=0.9, top_k=7, max_output_tokens=9, prompt_cache_key="s", user="u")
    seen = model.server.engine.seen[-1]
    p = seen.params
    assert (p.temperature, p.top_p, p.top_k, p.max_tokens) == (0.5, 0.9, 7, 9)
    assert (seen.routing.session, seen.routing.tenant) == ("s", "u")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": None}, "input is missing"),
        ({"input": []}, "input is empty"),
        (
            {"input": [{"type": "web_search_call"}]},
            "input has nothing that the model reads (input items of type 'web_search_call' were left out)",
        ),
        ({"input": [{}]}, "input[0].type is missing"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role is missing"),
        ({"input": [{"role": "user"}]}, "input[0].content is missing"),
        (
            {"input": [{"role": "bot", "content": "a"}]},
            "input[0].role is 'bot'; it takes one of user, assistant",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type is 'input_image'",
        ),
        (
            {"input": [{"type": "item_reference", "id": "a"}]},
            "input[0].type is 'item_reference'; items are not stored",
        ),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name is missing"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id is missing"),
        (
            {"input": [{"type": "function_call", "name": "a", "call_id": "c", "arguments": {}}]},
            "input[0].arguments is",
        ),
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id is 'resp_1'; it is not supported: answers are not stored",
        ),
        ({"conversation": "c"}, "conversation is 'c'"),
        ({"background": True}, "background is true"),
        ({"tool_choice": "required"}, "tool_choice asks for a call, but there are no tools"),
        (
            {"tool_choice": {"type": "function", "name": "a"}},
            "tool_choice.name is 'a'; it takes the name of one of the tools",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type is 'xml'"),
        ({"top_logprobs": 21}, "top_logprobs is 21"),
        ({"tools": [{"type": "function"}]}, "tools[0].name is missing"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{}]}]}, "tools[0].tools[0].name is missing"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
    ],
)
def test_refusals(model: Model, body: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        answer = model.post(**body, stream=stream)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"] and answer.json()["error"]["code"]


def test_a_prompt_that_does_not_fit(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    long = "word " * 9000
    for stream in (False, True):
        answer = model.post(input=long, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    streamed = model.post({"originator": "codex_exec"}, input=long, stream=True)
    last = events_of(streamed.text)[-1]
    assert (streamed.status_code, last["type"]) == (200, "response.failed")
    assert last["response"]["error"]["code"] == "context_length_exceeded"
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_an_error_in_the_middle_of_a_stream(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer, fail_after=2)) as server:
        body = {"model": "default", "input": "Hi"}
        assert HTTP.post(server.url + "/v1/responses", json=body).status_code == 500
        last = events_of(HTTP.post(server.url + "/v1/responses", json=body | {"stream": True}).text)[-1]
        assert last["type"] == "response.failed" and "boom" in last["response"]["error"]["message"]
        assert last["response"]["error"]["code"] == "server_error"


def test_tokens_are_counted_as_the_same_request_reads_them(model: Model) -> None:
    body = {
        "model": "default",
        "instructions": "S",
        "input": "Hi",
        "tools": TOOLS,
        "reasoning": {"effort": "max"},
    }
    model.reads(**body)
    counted = HTTP.post(model.url + "/input_tokens", json=body).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": len(model.server.engine.seen[-1].prompt),
    }


def test_openais_client(model: Model) -> None:
    text = f"Hm.</think>Hello.{calls(invoke('get_weather', city='Seoul'))}"
    model.server.engine.script = lambda prompt: text
    ask: dict[str, Any] = {
        "model": "default",
        "input": "Hi",
        "tools": [WEATHER],
        "reasoning": {"effort": "low"},
    }
    with openai.OpenAI(base_url=model.server.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(**ask)
        assert whole.output_text == "Hello." and [o.type for o in whole.output] == [
            "reasoning",
            "message",
            "function_call",
        ]
        with client.responses.stream(**ask) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert final.output_text == "Hello." and final.output[2].arguments == whole.output[2].arguments
        assert {"response.created", "response.reasoning_text.delta", "response.completed"} <= kinds
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="default", input="Hi", previous_response_id="r")


@pytest.mark.parametrize("wish", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
def test_log_probabilities_of_the_text(model: Model, wish: dict[str, Any]) -> None:
    """Of its tokens alone, the same streamed and whole; the thoughts' are not told."""
    text = "Hm, let me see.</think>Two words and more."
    got = model.says(text, reasoning={"effort": "high"}, **wish)
    (judged,) = [item["content"][0]["logprobs"] for item in got["output"] if item["type"] == "message"]
    assert "".join(one["token"] for one in judged) == "Two words and more."
    top = wish.get("top_logprobs", 0)
    assert all(one["logprob"] <= 0 and bytes(one["bytes"]).decode() == one["token"] for one in judged)
    assert all(len(one["top_logprobs"]) == top for one in judged)
