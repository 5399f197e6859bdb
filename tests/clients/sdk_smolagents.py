"""Run in the tool frameworks' own environment: smolagents' agents with a tool, one that calls by JSON and one that writes code; a JSON schema."""

import json
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


model = OpenAIModel("dsv4", api_base=sys.argv[1] + "/v1", api_key="k", client_kwargs={"max_retries": 0})
for stream in (False, True):
    agent = ToolCallingAgent([get_weather], model, max_steps=20, verbosity_level=0, stream_outputs=stream)
    assert agent.run("Weather?") == "All done."
    results = [str(step.observations) for step in agent.memory.steps if getattr(step, "observations", None)]
    assert sum("sunny in echo" in r for r in results) == 10, results

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
wanted = {"type": "json_schema", "json_schema": {"name": "City", "strict": True, "schema": SCHEMA}}
asked = [{"role": "user", "content": [{"type": "text", "text": "Extract the city."}]}]
assert json.loads(model.generate(asked, response_format=wanted).content) == {"city": "Paris"}
