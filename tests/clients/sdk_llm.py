"""Run in its own environment: the `llm` command with a tool loop, a schema, and a stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

home = Path(os.environ["HOME"], "llm")
home.mkdir()
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: v4\n  model_name: dsv4\n  api_base: {sys.argv[1]}/v1\n  api_key_name: none\n"
    "  supports_tools: true\n  supports_schema: true\n"
)


def llm(*arguments: str) -> str:
    """What it says."""
    command = [sys.executable, "-m", "llm", "-m", "v4", "--key", "k", *arguments]
    done = subprocess.run(
        command, env={**os.environ, "LLM_USER_PATH": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


TOOL = "def get_weather(city: str) -> str:\n    'The weather of a city.'\n    return f'sunny in {city}'"
for stream in ((), ("--no-stream",)):
    said = llm("--functions", TOOL, "--td", "--chain-limit", "20", *stream, "Weather?")
    assert "All done." in said and "sunny in echo" in said, said
    assert json.loads(llm("--schema", "city str", *stream, "Extract the city.")) == {"city": "Paris"}
