"""Messages to a V4 prompt.

The released models have no template language; their prompt is BOS, system text, then turns between markers (spec 9.3,
release file encoding/encoding_dsv4.py). User text never becomes a marker: the result is a list of segments in which
only `Marker`s are special tokens.

    BOS system ⟨User⟩question⟨Assistant⟩</think>answer EOS ⟨User⟩…⟨Assistant⟩<think>
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError, RequestError
from dsv4.model.config import ModelConfig, read_json
from dsv4.text.tokenizer import Marker, Segments

BOS, EOS = Marker("<｜begin▁of▁sentence｜>"), Marker("<｜end▁of▁sentence｜>")
USER, ASSISTANT = Marker("<｜User｜>"), Marker("<｜Assistant｜>")
THINK, END_THINK = Marker("<think>"), Marker("</think>")
REMINDER, DSML = Marker("<｜latest_reminder｜>"), Marker("｜DSML｜")
TASKS = {t: Marker(f"<｜{t}｜>") for t in ("action", "query", "authority", "domain", "title", "read_url")}
"""Quick tasks the model was trained on: a message's `task` asks for a short verdict on it."""

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
EFFORTS = ("low", "high", "max")

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
_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The texts that differ between trainings. `whole_schema`: tools are listed with their OpenAI wrapper."""

    efforts: Mapping[str, str]
    tools_before: str = _TOOLS_BEFORE
    tools_after: str = _TOOLS_AFTER
    whole_schema: bool = False

    @classmethod
    def for_model(cls, path: str | Path, config: ModelConfig) -> ChatFormat:
        """The directory's chat_format.json where there is one, else that of the release the config belongs to.
        Raises ConfigError."""
        base = GA if config.draft == "dspark" else PREVIEW
        file = Path(path) / "chat_format.json"
        if not file.exists():
            return base
        raw, known = read_json(file), [f.name for f in dataclasses.fields(cls)]
        unknown = next((k for k in raw if k not in known), None)
        if unknown is not None:
            raise ConfigError(f"{file} has the key {unknown!r}; known are {', '.join(known)}")
        for key, value in raw.items():
            if type(value) is not type(getattr(base, key)):
                raise ConfigError(
                    f"{file} has {key} = {value!r:.40}; it must be like {getattr(base, key)!r:.40}"
                )
        efforts = raw.get("efforts", base.efforts)
        if "low" not in efforts or not all(isinstance(text, str) for text in efforts.values()):
            raise ConfigError(f"{file} has efforts without 'low', or whose prefixes are no texts")
        return dataclasses.replace(base, **raw)


PREVIEW = ChatFormat({"low": "", "high": "", "max": _ABSOLUTE_MAXIMUM})
GA = ChatFormat({"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM})


@dataclass(slots=True)
class _Turn:
    """A message after merging: tool results and neighbouring user messages form one user turn."""

    role: str
    blocks: list[tuple[str | None, str]]
    """User turns: (tool call id or None, text)."""
    message: Mapping[str, Any]


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: str = "low",
    drop_thinking: bool = True,
    response_schema: Mapping[str, Any] | None = None,
    format: ChatFormat = GA,
) -> Segments:
    """The prompt up to and with the opening of the next assistant turn.

    Reasoning of earlier turns is dropped unless there are tools (then the transcript only grows) or `drop_thinking` is
    off. Raises RequestError naming the message and field.
    """
    if effort not in format.efforts:
        raise RequestError(
            f"reasoning effort is {effort!r}; valid are {', '.join(format.efforts)}", "reasoning_effort"
        )
    turns = _merge(messages)
    if tools or response_schema:
        _attach(turns, tools, response_schema)
    _sort_results(turns)
    keep = not drop_thinking or any(t.message.get("tools") for t in turns)
    last_user = max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)
    if thinking and not keep:
        turns = [t for i, t in enumerate(turns) if t.role != "developer" or i >= last_user]
        last_user = max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)
    out: Segments = [BOS, format.efforts[effort] if thinking else ""]
    for i, turn in enumerate(turns):
        verdict = i > 0 and turns[i - 1].message.get("task")  # the answer to a quick task has no reasoning
        out += _render(turn, thinking and not verdict and (keep or i > last_user), format)
        following = turns[i + 1].role if i + 1 < len(turns) else "assistant"
        if following not in ("assistant", "latest_reminder"):
            continue
        task = turn.message.get("task")
        opened = [ASSISTANT, THINK if thinking and (task or keep or i >= last_user) else END_THINK]
        if task:
            out += [*opened, TASKS[task]] if task == "action" else [TASKS[task]]
        elif turn.role in ("user", "developer"):
            out += opened
    return [s for s in out if s]


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    if not messages:
        raise RequestError("messages is empty; it needs at least one message", "messages")
    turns: list[_Turn] = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            close = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(
                f"messages[{i}].role is {role!r}; valid are {', '.join(ROLES)}{hint}", f"messages[{i}].role"
            )
        text = _text(message, i)
        _check_extras(message, i)
        if role in ("user", "tool"):
            block = (str(message.get("tool_call_id") or ""), text) if role == "tool" else (None, text)
            if turns and turns[-1].role == "user" and (role == "tool" or not turns[-1].message.get("task")):
                turns[-1].blocks.append(block)
            else:
                turns.append(_Turn("user", [block], message if role == "user" else {}))
        else:
            turns.append(_Turn(role, [(None, text)], message))
    return turns


def _check_extras(message: Mapping[str, Any], i: int) -> None:
    for key in ("tools", "tool_calls"):
        if not isinstance(message.get(key) or [], (list, tuple)):
            where = f"messages[{i}].{key}"
            raise RequestError(f"{where} is {type(message[key]).__name__}; it must be a list", where)
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        where = f"messages[{i}].task"
        raise RequestError(f"{where} is {task!r}; valid are {', '.join(TASKS)}", where)


def _text(message: Mapping[str, Any], i: int) -> str:
    """The content as one text: a string, a list of text parts, or nothing for an assistant that only called tools."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":
        return ""
    if isinstance(content, list):
        parts = []
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                where = f"messages[{i}].content[{j}]"
                raise RequestError(f"{where} has type {kind!r}; this model reads text parts only", where)
            parts.append(part["text"])
        return "\n\n".join(parts)
    where = f"messages[{i}].content"
    raise RequestError(f"{where} is {type(content).__name__}; it must be text or a list of text parts", where)


def _attach(
    turns: list[_Turn], tools: Sequence[Mapping[str, Any]] | None, response_schema: Mapping[str, Any] | None
) -> None:
    """Tools and response schema belong to the system message; one is made where there is none."""
    if turns[0].role != "system":
        turns.insert(0, _Turn("system", [(None, "")], {}))
    extra = {"tools": list(tools or ()), "response_schema": response_schema}
    turns[0].message = {**turns[0].message, **{k: v for k, v in extra.items() if v}}


def _sort_results(turns: list[_Turn]) -> None:
    """Tool results in the order of the calls they answer; text between them stays where it is."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            order = {
                str(c.get("id") or ""): n
                for n, c in enumerate(turn.message["tool_calls"])
                if isinstance(c, Mapping)
            }
        elif turn.role == "user" and order:
            slots = [n for n, (call, _) in enumerate(turn.blocks) if call is not None]
            results = sorted((turn.blocks[n] for n in slots), key=lambda b: order.get(b[0] or "", 0))
            for n, block in zip(slots, results, strict=True):
                turn.blocks[n] = block


def _render(turn: _Turn, reasoning: bool, format: ChatFormat) -> Segments:
    text = turn.blocks[0][1]
    if turn.role == "system":
        return [text, *_instructions(turn.message, format)]
    if turn.role == "developer":
        return [USER, text, *_instructions(turn.message, format)]
    if turn.role == "latest_reminder":
        return [REMINDER, text]
    if turn.role == "user":
        shown = [t if call is None else f"<tool_result>{t}</tool_result>" for call, t in turn.blocks]
        return [USER, "\n\n".join(shown)]
    thought = turn.message.get("reasoning_content") or turn.message.get("reasoning") or ""
    before = [str(thought), END_THINK] if reasoning else []
    return [*before, text, *_tool_calls(turn.message.get("tool_calls") or ()), EOS]


def _instructions(message: Mapping[str, Any], format: ChatFormat) -> Segments:
    out: Segments = []
    if message.get("tools"):
        schemas = [_schema(tool, i, format) for i, tool in enumerate(message["tools"])]
        out += ["\n\n", *_trusted(format.tools_before), "\n".join(schemas), *_trusted(format.tools_after)]
    if message.get("response_schema"):
        out += [_RESPONSE_FORMAT, _json(message["response_schema"])]
    return out


def _schema(tool: Any, i: int, format: ChatFormat) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"tools[{i}] has no function with a name", f"tools[{i}]")
    return _json(tool if format.whole_schema else function)


def _tool_calls(calls: Sequence[Mapping[str, Any]]) -> Segments:
    if not calls:
        return []
    out: Segments = ["\n\n<", DSML, "tool_calls>\n"]
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tool_calls[{n}] has no function with a name", "messages")
        out += ["\n" if n else "", "<", DSML, f'invoke name="{function["name"]}">\n']
        arguments = function.get("arguments")
        out += _parameters("{}" if arguments is None else arguments)
        out += ["\n</", DSML, "invoke>"]
    return [*out, "\n</", DSML, "tool_calls>"]


def _parameters(arguments: Any) -> Segments:
    """One DSML parameter per key. Arguments that are no JSON object become one parameter named `arguments`."""
    values = arguments
    if isinstance(arguments, str):
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):  # the latter: nested deeper than any tool's arguments
            values = None
    if not isinstance(values, Mapping):
        values = {"arguments": arguments}  # as the release's encoder has it
    out: Segments = []
    for n, (key, value) in enumerate(values.items()):
        plain = isinstance(value, str)
        head = f'parameter name="{key}" string="{"true" if plain else "false"}">'
        out += ["\n<" if n else "<", DSML, head, value if plain else _json(value), "</", DSML, "parameter>"]
    return out


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _trusted(text: str) -> Segments:
    """Our own text, in which markers are markers."""
    return [
        Marker(p) if p in (DSML, THINK, END_THINK) else p
        for p in re.split("(｜DSML｜|<think>|</think>)", text)
        if p
    ]
