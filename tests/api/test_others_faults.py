"""Requests that other servers answered with faults (the issue stands beside each; vLLM's unless said): bodies that their endpoints refused or
fell over, and what is to be read of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

HTTP = httpx.Client(timeout=60)
HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [HI, *messages], "tools": [TOOL], **more}


def called(arguments: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    """An assistant's message with a call."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "seen"}
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}


def items(*more: dict[str, Any], **body: Any) -> dict[str, Any]:
    return {"input": [ITEM, *more], **body}


def blocks(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"max_tokens": 20, "messages": [{"role": r, "content": c} for r, c in messages], **more}


USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
BACK = {"type": "tool_result", "tool_use_id": "t1"}
CHAT, RESPONSES, MESSAGES = "chat/completions", "responses", "messages"
TAKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    # A call in the history whose arguments are no object would make every later turn fail.
    "#47761 arguments cut short": (CHAT, chat(called('{"contents": "abc'), RESULT), "seen"),
    "#43851 arguments null": (CHAT, chat(called("null"), RESULT), 'invoke name="look"'),
    "arguments empty": (CHAT, chat(called(""), RESULT), 'invoke name="look"'),
    "arguments a list": (CHAT, chat(called("[1]"), RESULT), "seen"),
    "arguments an object": (CHAT, chat(called({"a": 1}), RESULT), "seen"),
    "rig #1362 content an empty list": (CHAT, chat(called("{}", []), RESULT), "seen"),
    "content empty": (CHAT, chat(called("{}", ""), RESULT), "seen"),
    "llama-cpp-python #1805 no content": (
        CHAT,
        chat({k: v for k, v in called("{}").items() if k != "content"}, RESULT),
        "seen",
    ),
    "sglang #3637 result of parts": (
        CHAT,
        chat(called("{}"), {**RESULT, "content": [{"type": "text", "text": "seen"}]}),
        "seen",
    ),
    "empty result": (CHAT, chat(called("{}"), {**RESULT, "content": ""}), "<tool_result></tool_result>"),
    "result null": (CHAT, chat(called("{}"), {**RESULT, "content": None}), "<tool_result></tool_result>"),
    "result without its call": (CHAT, chat(RESULT), "seen"),
    "empty tool_calls": (CHAT, chat({"role": "assistant", "content": "ok", "tool_calls": []}, HI), "ok"),
    "tool_calls null": (CHAT, chat({"role": "assistant", "content": "ok", "tool_calls": None}, HI), "ok"),
    "name on a message": (CHAT, chat({**HI, "name": "bob"}), "Hi"),
    "empty tools": (CHAT, chat(tools=[]), "Hi"),
    "empty tools and a choice": (CHAT, chat(tools=[], tool_choice="auto"), "Hi"),
    "tool without parameters": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "look"}}]),
        "look",
    ),
    "parameters null": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "look", "parameters": None}}]),
        "look",
    ),
    "strict null": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "look", "strict": None}}]),
        "look",
    ),
    "stop null": (CHAT, chat(stop=None), "Hi"),
    "empty stop list": (CHAT, chat(stop=[]), "Hi"),
    "max_tokens null": (CHAT, chat(max_tokens=None), "Hi"),
    "response_format text": (CHAT, chat(response_format={"type": "text"}), "Hi"),
    "only a system message": (CHAT, {"messages": [{"role": "system", "content": "Be."}]}, "Be."),
    "stream_options without a stream": (CHAT, chat(stream_options={"include_usage": True}), "Hi"),
    "reasoning of another server": (
        CHAT,
        chat({"role": "assistant", "content": "ok", "reasoning": "hm"}, HI),
        "ok",
    ),
    "annotations and audio null": (
        CHAT,
        chat(
            {"role": "assistant", "content": "ok", "annotations": [], "audio": None, "function_call": None},
            HI,
        ),
        "ok",
    ),
    # Items that clients send back as they got them, or as they rebuilt them.
    "#54224 id null": (
        RESPONSES,
        items(
            {
                "type": "message",
                "role": "assistant",
                "id": None,
                "status": "completed",
                "content": [{"type": "output_text", "text": "ok", "annotations": []}],
            },
            ITEM,
        ),
        "ok",
    ),
    "TensorRT-LLM #17738 reasoning without content": (
        RESPONSES,
        items({"type": "reasoning", "id": "rs_1", "summary": []}, ITEM),
        "Hi",
    ),
    "llama.cpp #29159 summary null": (
        RESPONSES,
        items({"type": "reasoning", "id": "r1", "summary": None}, ITEM),
        "Hi",
    ),
    "reasoning of another server, sealed": (
        RESPONSES,
        items(
            {"type": "reasoning", "id": "r1", "summary": [], "content": None, "encrypted_content": "gAAAA"},
            ITEM,
        ),
        "Hi",
    ),
    "#28248 reasoning first": (
        RESPONSES,
        {
            "input": [
                {
                    "type": "reasoning",
                    "id": "x",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                ITEM,
            ]
        },
        "Hi",
    ),
    "no type on messages": (
        RESPONSES,
        {"input": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]},
        "Be.",
    ),
    "output of parts": (
        RESPONSES,
        items(
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_text", "text": "seen"}],
            },
        ),
        "seen",
    ),
    "arguments empty, id null": (
        RESPONSES,
        items(
            {"type": "function_call", "id": None, "call_id": "c", "name": "look", "arguments": ""},
            {"type": "function_call_output", "call_id": "c", "output": "seen"},
        ),
        "seen",
    ),
    "arguments cut short": (
        RESPONSES,
        items(
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"cmd": "a'},
            {"type": "function_call_output", "call_id": "c", "output": "seen"},
        ),
        "seen",
    ),
    "assistant without content": (
        RESPONSES,
        items({"type": "message", "role": "assistant", "content": []}, ITEM),
        "Hi",
    ),
    "text format": (RESPONSES, items(text={"format": {"type": "text"}, "verbosity": "medium"}), "Hi"),
    "nulls everywhere": (
        RESPONSES,
        items(
            tools=None,
            tool_choice=None,
            reasoning=None,
            text=None,
            include=None,
            metadata=None,
            instructions=None,
            previous_response_id=None,
        ),
        "Hi",
    ),
    "hosted calls left behind": (
        RESPONSES,
        items({"type": "web_search_call", "id": "w", "status": "completed"}, {"type": "mcp_call", "id": "m"}),
        "Hi",
    ),
    # Claude Code and its like.
    "claude-code #31033 defer_loading": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            tools=[{"name": "look", "input_schema": {"type": "object"}, "defer_loading": True}],
        ),
        "look",
    ),
    "claude-code #20692 text before thinking": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            (
                "assistant",
                [{"type": "text", "text": "ok"}, {"type": "thinking", "thinking": "hm", "signature": "x"}],
            ),
            ("user", "Hi"),
        ),
        "ok",
    ),
    "claude-code #12692 a result without its call": (
        MESSAGES,
        blocks(("user", [{**BACK, "content": "seen"}])),
        "seen",
    ),
    "result without content": (
        MESSAGES,
        blocks(("user", "Hi"), ("assistant", [USE]), ("user", [BACK])),
        "<tool_result></tool_result>",
    ),
    "result null in blocks": (
        MESSAGES,
        blocks(("user", "Hi"), ("assistant", [USE]), ("user", [{**BACK, "content": None}])),
        "<tool_result></tool_result>",
    ),
    "result an empty list": (
        MESSAGES,
        blocks(("user", "Hi"), ("assistant", [USE]), ("user", [{**BACK, "content": [], "is_error": True}])),
        "<tool_result></tool_result>",
    ),
    "empty text beside a call": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            ("assistant", [{"type": "text", "text": ""}, USE]),
            ("user", [{**BACK, "content": "seen"}]),
        ),
        "seen",
    ),
    "assistant of nothing": (MESSAGES, blocks(("user", "Hi"), ("assistant", []), ("user", "Go")), "Go"),
    "two users in a row": (MESSAGES, blocks(("user", "Hi"), ("user", "Go")), "Go"),
    "assistant first": (MESSAGES, blocks(("assistant", "ok"), ("user", "Go")), "Go"),
    "system null": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            system=None,
            tools=None,
            tool_choice=None,
            thinking=None,
            stop_sequences=None,
            metadata=None,
        ),
        "Hi",
    ),
    "system an empty list": (MESSAGES, blocks(("user", "Hi"), system=[]), "Hi"),
    "cache_control null": (
        MESSAGES,
        blocks(("user", [{"type": "text", "text": "Hi", "cache_control": None, "citations": None}])),
        "Hi",
    ),
    "unknown thinking fields": (
        MESSAGES,
        blocks(("user", "Hi"), thinking={"type": "enabled", "budget_tokens": 99999, "x": 1}),
        "Hi",
    ),
    "a result and text": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            ("assistant", [USE]),
            ("user", [{"type": "text", "text": "note"}, {**BACK, "content": "seen"}]),
        ),
        "seen",
    ),
    "server tool blocks": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            (
                "assistant",
                [
                    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                    {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
                    {"type": "text", "text": "ok"},
                ],
            ),
            ("user", "Go"),
        ),
        "ok",
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a seed beyond 64 bits": (CHAT, chat(seed=-(2**63) - 1), "seed is"),
    "an unread display": (MESSAGES, blocks(("user", "Hi"), thinking={"display": 5}), "thinking.display is 5"),
    "a format's name": (
        RESPONSES,
        items(text={"format": {"type": "json_schema", "name": 5, "schema": {}}}),
        "text.format.name is 5",
    ),
    "#55974 item_reference": (
        RESPONSES,
        items({"type": "item_reference", "id": "x"}),
        "input[1].type is 'item_reference'",
    ),
    "an image": (
        CHAT,
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
        "text parts only",
    ),
    "an image in a result": (
        MESSAGES,
        blocks(
            ("user", "Hi"),
            ("assistant", [USE]),
            ("user", [{**BACK, "content": [{"type": "image", "source": {}}]}]),
        ),
        "reads text only",
    ),
    "negative max_tokens": (CHAT, chat(max_tokens=-1), "max_tokens is -1"),
    "a role that is none": (CHAT, chat({"role": "robot", "content": "x"}), "messages[1].role is 'robot'"),
    "no messages": (CHAT, {"messages": []}, "messages is empty"),
    "no input": (RESPONSES, {"input": []}, "input is empty"),
    "user without content": (CHAT, chat({"role": "user"}), "messages[1].content"),
    "arguments a number": (CHAT, chat(called(5)), "arguments is 5"),
    "tool without a name": (
        CHAT,
        chat(tools=[{"type": "function", "function": {}}]),
        "tools[0].function.name is missing",
    ),
}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    thinks = tokenizer.encode("<think>")[-1]
    with running(
        FakeEngine(lambda p: "Hm.</think>Fine." if p[-1] == thinks else "Fine.", tokenizer=tokenizer)
    ) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", TAKEN)
def test_it_is_taken(server: RunningServer, name: str, stream: bool) -> None:
    endpoint, body, read = TAKEN[name]
    answer = HTTP.post(f"{server.url}/v1/{endpoint}", json={"model": "default", **body, "stream": stream})
    assert answer.status_code == 200, answer.text
    assert "Fine." in "".join(_texts(answer.text)) or "Fine." in answer.text
    prompt = server.engine.tokenizer.decode(server.engine.seen[-1].prompt, skip_special=False)
    assert read in prompt, prompt


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(server: RunningServer, name: str, stream: bool) -> None:
    endpoint, body, says = REFUSED[name]
    answer = HTTP.post(f"{server.url}/v1/{endpoint}", json={"model": "default", **body, "stream": stream})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_the_shape_that_clients_read(server: RunningServer, n: int) -> None:
    """sglang #7708, #8417: one chunk with a reason for each choice, and the right one; the role first; the usage last, without choices."""
    body = {"model": "default", **chat(), "n": n, "stream": True, "stream_options": {"include_usage": True}}
    lines = [
        line
        for line in HTTP.post(f"{server.url}/v1/{CHAT}", json=body).text.split("\n\n")
        if line.startswith("data: ")
    ]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    *rest, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert all(len(c["choices"]) == 1 and c["usage"] is None for c in rest)
    for index in range(n):
        own = [c["choices"][0] for c in rest if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant" and "role" not in own[1]["delta"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]
        assert "".join(c["delta"].get("content") or "" for c in own) == "Fine."


def _texts(stream: str) -> Iterator[str]:
    """The text of a stream's deltas, in any dialect."""
    for line in stream.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            delta = event.get("delta")
            for choice in event.get("choices") or ():
                yield choice["delta"].get("content") or ""
            yield delta if isinstance(delta, str) else (delta or {}).get("text", "")
