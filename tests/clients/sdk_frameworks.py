"""Run in the frameworks' own environment: a tool loop through LangChain and Pydantic AI, by each dialect that they speak."""

import sys

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

URL = sys.argv[1]


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


for model in (
    ChatOpenAI(model="dsv4", base_url=URL + "/v1", api_key="k", max_retries=0),
    ChatOpenAI(model="dsv4", base_url=URL + "/v1", api_key="k", max_retries=0, use_responses_api=True),
    ChatAnthropic(model="dsv4", base_url=URL, api_key="k", max_tokens=2000, max_retries=0),
):
    bound, messages = model.bind_tools([get_weather]), [HumanMessage("Weather?")]
    while True:
        answer = bound.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [
            ToolMessage(get_weather.invoke(c["args"]), tool_call_id=c["id"]) for c in answer.tool_calls
        ]
    assert answer.text == "All done.", answer
    assert "".join(chunk.text for chunk in model.stream("Hi")) == "All done."

openai = OpenAIProvider(base_url=URL + "/v1", api_key="k")
for made in (
    OpenAIChatModel("dsv4", provider=openai),
    OpenAIResponsesModel("dsv4", provider=openai),
    AnthropicModel("dsv4", provider=AnthropicProvider(base_url=URL, api_key="k")),
):
    agent = Agent(made)
    agent.tool_plain(get_weather.func)
    assert agent.run_sync("Weather?").output == "All done."
