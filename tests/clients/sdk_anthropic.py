"""Run by Anthropic's SDK's own environment: messages with a tool loop, whole and streamed, counting, models."""

import sys

import anthropic

TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="k", max_retries=0)

for stream in (False, True):
    messages = [{"role": "user", "content": "Weather?"}]
    while True:
        ask = {"model": "dsv4", "max_tokens": 2000, "messages": messages, "tools": [TOOL]}
        ask["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        if stream:
            with client.messages.stream(**ask) as events:
                for _ in events:
                    pass
                message = events.get_final_message()
        else:
            message = client.messages.create(**ask)
        messages.append({"role": "assistant", "content": message.content})
        calls = [b for b in message.content if b.type == "tool_use"]
        if message.stop_reason != "tool_use":
            break
        results = [{"type": "tool_result", "tool_use_id": c.id, "content": c.input["city"]} for c in calls]
        messages.append({"role": "user", "content": results})
    assert [b.type for b in message.content] == ["thinking", "text"] and message.content[
        1
    ].text == "All done."
    assert message.usage.input_tokens > 10 and message.stop_reason == "end_turn"
assert client.messages.count_tokens(model="dsv4", messages=messages[:1]).input_tokens > 3
assert next(iter(client.models.list())).id == "dsv4"
try:
    client.messages.create(model="gpt", max_tokens=5, messages=messages[:1])
    raise AssertionError("not refused")
except anthropic.NotFoundError as e:
    assert e.body["error"]["type"] == "not_found_error"
