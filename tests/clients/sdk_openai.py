"""Run by OpenAI's SDK's own environment: chat completions and Responses with a tool loop, whole and streamed."""

import sys

import openai

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": False}
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="k", max_retries=0)

for stream in (False, True):
    messages = [{"role": "user", "content": "Weather?"}]
    while True:
        ask = {"model": "dsv4", "messages": messages, "tools": [CHAT_TOOL], "reasoning_effort": "high"}
        if stream:
            with client.chat.completions.stream(**ask) as events:
                for _ in events:
                    pass
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**ask).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        messages += [
            {"role": "tool", "tool_call_id": c.id, "content": c.function.arguments}
            for c in message.tool_calls
        ]
    assert message.content == "All done.", message

    items = [{"role": "user", "content": "Weather?"}]
    while True:
        ask = {"model": "dsv4", "input": items, "tools": [TOOL], "reasoning": {"effort": "high"}}
        if stream:
            with client.responses.stream(**ask) as events:
                for _ in events:
                    pass
                response = events.get_final_response()
        else:
            response = client.responses.create(**ask)
        items += [item.model_dump(exclude_none=True) for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        items += [
            {"type": "function_call_output", "call_id": c.call_id, "output": c.arguments} for c in calls
        ]
    assert response.output_text == "All done." and response.status == "completed", response
assert "dsv4" in [m.id for m in client.models.list()]
