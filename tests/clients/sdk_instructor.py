"""Run in the tool frameworks' own environment: Instructor's ways to get an object of a class out of a model, whole and in parts."""

import sys

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    """What is extracted."""

    city: str


ASK = {
    "model": "dsv4",
    "response_model": City,
    "max_retries": 0,
    "messages": [{"role": "user", "content": "Extract the city."}],
}
for mode in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "PARALLEL_TOOLS", "RESPONSES_TOOLS"):
    inner = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="k", max_retries=0)
    client = instructor.from_openai(inner, mode=instructor.Mode[mode])
    if mode == "PARALLEL_TOOLS":
        from collections.abc import Iterable

        assert [
            c.city for c in client.chat.completions.create(**ASK | {"response_model": Iterable[City]})
        ] == ["Paris"]
        continue
    assert client.chat.completions.create(**ASK).city == "Paris", mode
    if mode not in ("MD_JSON", "RESPONSES_TOOLS"):
        *_, last = client.chat.completions.create_partial(**ASK)
        assert last.city == "Paris", mode
