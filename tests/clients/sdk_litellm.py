"""Run by LiteLLM's own environment: a tool loop through each of its providers that can talk to this server."""

import sys

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
for provider, base in (("hosted_vllm", "/v1"), ("openai", "/v1"), ("deepseek", "/v1"), ("anthropic", "")):
    messages = [{"role": "user", "content": "Weather?"}]
    while True:
        answer = litellm.completion(
            f"{provider}/dsv4",
            messages=messages,
            tools=[TOOL],
            api_base=sys.argv[1] + base,
            api_key="k",
            max_tokens=2000,
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        messages += [
            {"role": "tool", "tool_call_id": c.id, "content": c.function.arguments}
            for c in message.tool_calls
        ]
    assert message.content == "All done.", (provider, message)
response = litellm.responses(model="hosted_vllm/dsv4", input="Hi", api_base=sys.argv[1] + "/v1", api_key="k")
assert response.output[-1].content[0].text == "All done.", response
