"""Server-sent events of the dialects put together as their clients do."""

from __future__ import annotations

import json
from typing import Any


def events_of(stream: str) -> list[dict[str, Any]]:
    """The data of each event, in order; its name must be the type in it."""
    events = []
    for frame in stream.split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        named, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert named == f"event: {event['type']}"
        events.append(event)
    return events


def anthropic_message(stream: str) -> dict[str, Any]:
    """The message that a stream of Anthropic's dialect says."""
    events = events_of(stream)
    assert [e["type"] for e in events[:1]] == ["message_start"] and events[-1] == {"type": "message_stop"}
    message, open_at, partial = events[0]["message"], None, ""
    for event in events[1:-1]:
        kind = event["type"]
        if kind == "content_block_start":
            assert open_at is None and event["index"] == len(message["content"])
            open_at, partial = event["index"], ""
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert event["index"] == open_at
            delta, block = event["delta"], message["content"][-1]
            field = delta["type"].removesuffix("_delta")
            if field == "input_json":
                partial += delta["partial_json"]
            elif field == "signature":
                block["signature"] = delta["signature"]
            else:
                assert delta[field] and block["type"] == field
                block[field] += delta[field]
        elif kind == "content_block_stop":
            assert event["index"] == open_at
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = partial
            open_at = None
        else:
            assert kind == "message_delta" and open_at is None
            message |= event["delta"]
            for name in ("input_tokens", "cache_read_input_tokens"):
                assert event["usage"][name] == message["usage"][name], "known at the start"
            message["usage"] = event["usage"]
    return message


def openai_response(stream: str) -> dict[str, Any]:
    """The response that a stream of the Responses API says, from its deltas; every event that says more agrees."""
    events = events_of(stream)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and not events[0]["response"]["output"]
    output: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        assert event["output_index"] == len(output) - 1
        item = output[-1]
        if kind == "output_item.done":
            assert event["item"] | {"status": 0, "encrypted_content": 0} == item | {
                "status": 0,
                "encrypted_content": 0,
            }
            output[-1] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        field = {"function_call_arguments": "arguments", "custom_tool_call_input": "input"}.get(
            kind.split(".")[0], "text"
        )
        holder = item if field != "text" else item["content"][-1] if item["content"] else None
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "content_part.done":
            assert event["part"] == holder
        elif kind.endswith(".delta"):
            assert event["delta"] and holder is not None
            holder[field] += event["delta"]
            if event.get("logprobs"):
                holder["logprobs"] = holder["logprobs"] + event["logprobs"]
        else:
            assert kind.endswith(".done") and holder is not None and event[field] == holder[field]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}" and last["output"] == output
    return last
