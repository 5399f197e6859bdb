"""Run in the tool frameworks' own environment: LlamaIndex with its class for servers of OpenAI's kind: an agent with a tool, structured
outputs, chat and completion."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """What is extracted."""

    city: str


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


TOOL = FunctionTool.from_defaults(get_weather)


async def agent(llm: OpenAILike, streaming: bool) -> None:
    """A loop to its end."""
    worker = FunctionAgent(tools=[TOOL], llm=llm, streaming=streaming, timeout=200)
    answer = await worker.run("Weather?", max_iterations=20)
    assert str(answer) == "All done.", answer
    assert len(answer.tool_calls) == 11 and "sunny in echo" in str(answer.tool_calls[-1].tool_output)


how = {
    "model": "dsv4",
    "api_base": sys.argv[1] + "/v1",
    "api_key": "k",
    "max_retries": 0,
    "context_window": 65536,
}
llm = OpenAILike(**how, is_chat_model=True, is_function_calling_model=True)


async def agents() -> None:
    """Both in one loop, as the client lives in it."""
    for streaming in (False, True):
        await agent(llm, streaming)


asyncio.run(agents())
assert llm.chat([ChatMessage("Hi")]).message.content == "All done."
assert "".join(part.delta for part in llm.stream_chat([ChatMessage("Hi")])) == "All done."
prompt = PromptTemplate("Extract the city.")
assert llm.structured_predict(City, prompt).city == "Paris"
assert llm.as_structured_llm(City).chat([ChatMessage("Extract the city.")]).raw.city == "Paris"
native = OpenAILike(
    **how, is_chat_model=True, is_function_calling_model=False, should_use_structured_outputs=True
)
assert native.structured_predict(City, prompt).city == "Paris"
plain = OpenAILike(**how, is_chat_model=False, max_tokens=20)
assert plain.complete("Hi").text == "All done."
