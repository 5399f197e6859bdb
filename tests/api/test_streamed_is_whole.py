"""What a stream says is what the whole answer says, in every dialect: over what models write, however it comes in pieces, and
wherever it ends. The engine's outputs are made here; the tests of each dialect do the same over HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dsv4.api import anthropic, openai_chat, responses
from dsv4.api.responses_input import ResponsesTools, ToolName
from dsv4.api.strict_tools import StrictTools
from dsv4.engine.request import RequestOutput, Started, Usage
from dsv4.sampling import SamplingParams
from dsv4.text.stream import Reading, TextStream
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tools import schemas_of

from tests.api.test_tool_calls import assembled
from tests.support.events import anthropic_message, openai_response
from tests.text.damage import TOOLS, shapes

SEEDS = 1000
ASKED = SimpleNamespace(prompt=np.arange(7, dtype=np.int32), keep=lambda reply: None)


def outputs(tokenizer: Tokenizer, seed: int) -> list[RequestOutput]:
    """One answer as an engine gives it: some tokens at a time, to its end or cut."""
    rng = random.Random(seed)
    text = rng.choice(SHAPES)
    thinking = rng.random() < 0.5
    tokens = tokenizer.encode(f"Hm — é.\n</think>{text}" if thinking and rng.random() < 0.8 else text)
    if rng.random() < 0.3:
        tokens = [i for c in tokenizer.decode(tokens, skip_special=False) for i in tokenizer.encode(c)]
    cut = rng.randrange(len(tokens) + 1) if rng.random() < 0.3 else None
    tokens = tokens[:cut]
    reading = Reading(thinking, rng.random() < 0.8, schemas_of(TOOLS), rng.choice([None, None, 1]))
    stream = TextStream(tokenizer, SamplingParams(stop=rng.choice([(), ("city",), ("\n",)])), reading)
    found = [RequestOutput("r", started=Started(7, 3))]
    while tokens and not stream.ended:
        step, tokens = tokens[: (count := rng.randint(1, 8))], tokens[count:]
        pieces = []
        for token in step:
            if not stream.ended:
                pieces += stream.push(token)
        found.append(RequestOutput("r", step, pieces))
        found += [RequestOutput("r", prefilled=3)] * (rng.random() < 0.1)
    reason = "length" if cut is not None and not stream.ended else "stop"
    pieces = stream.finish(cut=reason == "length")
    usage = Usage(7, 20, 3, {}, stream.reasoning_tokens)
    end = {"finished": True, "finish_reason": reason, "stop_reason": stream.stop_string, "usage": usage}
    return [*found, RequestOutput("r", [], pieces, **end)]


SHAPES = shapes()


def of_chat(news: list[RequestOutput], customs: Collection[str] = ()) -> tuple[Any, Any]:
    def made() -> openai_chat.Answer:
        options = openai_chat.Options(
            "m", 1, None, True, False, False, False, False, False, True, customs=frozenset(customs)
        )
        return openai_chat.Answer(None, options, "id", 0, ASKED, StrictTools([]))

    whole, streamed = made(), made()
    for output in news:
        whole.replies[0].read(output)
        whole.usage.add(0, output)
    frames = b"".join([*(streamed.chunks(0, output) for output in news), streamed.end()])
    (choice,) = whole.whole()["choices"]
    message = choice["message"]
    calls = [_function(c) for c in message.get("tool_calls") or ()]
    said = {
        "content": message["content"],
        "reasoning": message.get("reasoning_content"),
        "calls": [(c["name"], c["arguments"]) for c in calls],
        "finish": choice["finish_reason"],
        "stop": choice["stop_reason"],
    }
    return said, assembled(frames.decode())


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a custom tool as one of a function."""
    if call["type"] == "function":
        return call["function"]
    return {"name": call["custom"]["name"], "arguments": call["custom"]["input"]}


def of_anthropic(news: list[RequestOutput]) -> tuple[Any, Any]:
    def made() -> anthropic.Answer:
        return anthropic.Answer(anthropic.Options("m", True, True, ()), "id", ASKED, StrictTools([]))

    whole, streamed = made(), made()
    for output in news:
        whole.reply.read(output)
    message = anthropic_message(b"".join(streamed.events(output) for output in news).decode())
    for block in message["content"]:
        if block["type"] == "tool_use":
            block["input"] = anthropic.closed(block["input"])
    return [
        {k: v for k, v in m.items() if k != "content"} | {"content": _without_ids(m["content"])}
        for m in (whole.whole(), message)
    ]


def of_responses(news: list[RequestOutput], customs: Collection[str] = ()) -> tuple[Any, Any]:
    def made() -> responses.Answer:
        tools = ResponsesTools(names={name: ToolName(name, custom=True) for name in customs})
        options = responses.Options("m", True, True, None, {}, ())
        return responses.Answer(None, options, "id", tools, StrictTools([]))

    whole, streamed = made(), made()
    for output in news:
        whole.read(output)
    response = openai_response(b"".join(streamed.events(output) for output in news).decode())
    said = [{k: v for k, v in r.items() if k != "created_at"} for r in (whole.whole(), response)]
    return [r | {"output": _without_ids(r["output"])} for r in said]


def _without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


@pytest.mark.parametrize("dialect", [of_chat, of_anthropic, of_responses])
def test_streamed_is_whole(tokenizer: Tokenizer, dialect: Any) -> None:
    for seed in range(SEEDS):
        whole, streamed = dialect(outputs(tokenizer, seed))
        assert streamed == whole, seed


@pytest.mark.parametrize("dialect", [of_chat, of_responses])
def test_streamed_is_whole_with_custom_tools(tokenizer: Tokenizer, dialect: Any) -> None:
    """Of a tool that takes text, beside one that does not."""
    for seed in range(SEEDS):
        whole, streamed = dialect(outputs(tokenizer, seed), ("get_weather",))
        assert streamed == whole, seed


def test_dialects_say_the_same(tokenizer: Tokenizer) -> None:
    """Text, thoughts and calls of one answer are equal in all dialects."""
    for seed in range(100):
        news = outputs(tokenizer, seed)
        chat, message, response = (dialect(news)[0] for dialect in (of_chat, of_anthropic, of_responses))
        blocks, items = message["content"], response["output"]
        text = "".join(b["text"] for b in blocks if b["type"] == "text")
        assert (
            text
            == (chat["content"] or "")
            == "".join(p["text"] for i in items if i["type"] == "message" for p in i["content"])
        )
        thought = "".join(b["thinking"] for b in blocks if b["type"] == "thinking")
        assert (
            thought
            == (chat["reasoning"] or "")
            == "".join(p["text"] for i in items if i["type"] == "reasoning" for p in i["content"])
        )
        calls = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
        assert calls == chat["calls"]
        assert [(n, anthropic.closed(a)) for n, a in calls] == [
            (b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"
        ]
        assert json.dumps(response["usage"]) and (chat["finish"] == "length") == (
            response["status"] == "incomplete"
        )
