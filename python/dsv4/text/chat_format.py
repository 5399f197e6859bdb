"""The texts in which the prompts of V4's releases differ, and which of them a model directory has.

The preview has two thinking efforts with a text, the releases after it (0731, 0813) three: `high` has the text that was the
preview's `max`. What tells them apart is the release's own encoder, encoding/encoding_dsv4.py, which is read as text and
never run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.json_fields import read_json

ENCODERS = ("encoding/encoding_dsv4.py", "encoding_dsv4.py")
"""Where a model directory may have its release's encoder."""

_MAX_ENCODER_BYTES = 2**20

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, "
    "and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause "
    "rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that "
    "no assumption remains unchecked and no error remains undiscovered.\n\n"
)
_TOOLS_BEFORE = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The texts that differ between trainings. `whole_schema`: tools are listed with their OpenAI wrapper."""

    efforts: Mapping[str, str]
    tools_before: str = _TOOLS_BEFORE
    tools_after: str = _TOOLS_AFTER
    whole_schema: bool = False


PREVIEW = ChatFormat({"low": "", "high": "", "max": _ABSOLUTE_MAXIMUM})
GA = ChatFormat({"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM})
_NAMES = {id(PREVIEW): "the preview's", id(GA): "that of the releases since 0731"}


def choose_format(path: str | Path, config: ModelConfig) -> tuple[ChatFormat, str]:
    """The chat format of a model directory, and a clause that says which it is and why.

    The release's encoder in the directory decides; without one, the draft layers that the config describes do. On top of
    that comes chat_format.json, which replaces single texts. Raises ConfigError.
    """
    base, why = _by_encoder(Path(path)) or _by_config(config)
    said = f"{_NAMES[id(base)]}, as {why}"
    file = Path(path) / "chat_format.json"
    if not file.exists():
        return base, said
    format = _replaced(base, file)
    same = dataclasses.asdict(format) == dataclasses.asdict(base)
    return format, said if same else f"chat_format.json of the model, on top of {said}"


def _by_encoder(path: Path) -> tuple[ChatFormat, str] | None:
    for name in ENCODERS:
        try:
            with open(path / name, "rb") as file:
                text = file.read(_MAX_ENCODER_BYTES).decode("utf-8", "replace")
        except OSError:  # there is none
            continue
        if re.search(r"^REASONING_EFFORT_PROMPTS\b", text, re.MULTILINE):
            return GA, f"{name} has texts for three efforts"
        if re.search(r"^REASONING_EFFORT_MAX\b", text, re.MULTILINE):
            return PREVIEW, f"{name} has a text for one effort"
    return None


def _by_config(config: ModelConfig) -> tuple[ChatFormat, str]:
    if config.draft == "dspark":
        return GA, "config.json describes DSpark draft layers"
    return PREVIEW, "config.json describes no DSpark draft layers and there is no encoding/encoding_dsv4.py"


def _replaced(base: ChatFormat, file: Path) -> ChatFormat:
    raw, known = read_json(file), [f.name for f in dataclasses.fields(ChatFormat)]
    unknown = next((k for k in raw if k not in known), None)
    if unknown is not None:
        raise ConfigError(f"{file} has the key {unknown!r}; known are {', '.join(known)}")
    for key, value in raw.items():
        if type(value) is not type(getattr(base, key)):
            raise ConfigError(f"{file} has {key} = {value!r:.40}; it must be like {getattr(base, key)!r:.40}")
    efforts = raw.get("efforts", base.efforts)
    if "low" not in efforts or not all(isinstance(text, str) for text in efforts.values()):
        raise ConfigError(f"{file} has efforts without 'low', or whose prefixes are no texts")
    return dataclasses.replace(base, **raw)
