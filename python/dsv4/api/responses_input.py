"""A body of OpenAI's Responses API as a conversation, in the shape that the encoder takes.

Nothing is stored here, so every request brings the whole conversation, as Codex does: messages, reasoning, calls and their
outputs. Neighbouring items of the assistant are one turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsv4.api.conversation import EFFORTS, MAX_TOOLS, Conversation, settled
from dsv4.api.custom_tools import read_custom
from dsv4.api.fields import Fields
from dsv4.api.grammar import format_of, openai_choice, shown_name
from dsv4.api.parts import missing, parts_of, text_of, unread
from dsv4.api.thoughts import unsealed
from dsv4.errors import RequestError, show
from dsv4.text.form import Format

MAX_ITEMS = 65536
ENCRYPTED = "reasoning.encrypted_content"

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_READ = "input_text and output_text"


@dataclass(frozen=True, slots=True)
class ToolName:
    """How the client calls a tool. `custom`: it takes text in place of JSON."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(slots=True)
class ResponsesTools:
    """The tools of a request as the model sees them, in OpenAI's older shape."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, ToolName] = field(default_factory=dict)
    """By the name that the model sees."""
    inputs: dict[str, Format | None] = field(default_factory=dict)
    """What holds the texts of custom tools."""
    left_out: list[str] = field(default_factory=list)

    def add(self, tool: Fields, namespace: str | None = None) -> None:
        """Takes a tool; those of a namespace are shown as `NAMESPACE__NAME`, and what OpenAI hosts is left out."""
        kind = tool.text("type", "function")
        if kind == "namespace":
            for i, inner in enumerate(tool.items("tools", dict, MAX_TOOLS)):
                self.add(Fields(inner, f"{tool.where}tools[{i}]."), tool.text("name"))
        elif kind not in ("function", "custom"):
            self.left_out.append(f"tools of type {show(kind)} are hosted by OpenAI and were left out")
        else:
            self._add(tool, namespace, kind == "custom")

    def _add(self, tool: Fields, namespace: str | None, custom: bool) -> None:
        name = tool.text("name")
        if not name:
            raise missing(f"{tool.where}name")
        shown = shown_name(name, namespace)
        if shown in self.names:
            self.left_out.append(f"a second tool {show(shown)} was left out")
            return
        function: dict[str, Any] = {"name": shown}
        if custom:
            made, self.inputs[shown], unheld = read_custom(tool)
            function = made | function
            self.left_out += [unheld] if unheld else []
        elif (description := tool.text("description", longest=2**31)) is not None:
            function["description"] = description
        if not custom and tool.get("parameters") is not None:
            function["parameters"] = tool.nested("parameters").body
        if not custom and tool.boolean("strict"):
            function["strict"] = True
        self.names[shown] = ToolName(name, namespace, custom)
        self.shown.append({"type": "function", "function": function})


def read_input(fields: Fields) -> tuple[Conversation, ResponsesTools]:
    """The conversation of a body, and its tools. Raises RequestError."""
    tools = ResponsesTools()
    for i, tool in enumerate(fields.items("tools", dict, MAX_TOOLS)):
        tools.add(Fields(tool, f"tools[{i}]."))
    thinking, effort = _thinking(fields)
    choice = openai_choice(fields).among(tools.shown)
    return Conversation(
        _messages(fields, tools),
        tools.shown if choice.tools else [],
        thinking,
        effort,
        "opened",
        fields.nested("chat_template_kwargs").boolean("drop_thinking", True),
        parallel_calls=fields.boolean("parallel_tool_calls", True),
        choice=choice,
        format=format_of(fields.nested("text").nested("format")),
        inputs=tools.inputs,
    ), tools


def _thinking(fields: Fields) -> tuple[bool, str]:
    """`reasoning.effort` decides; without it, to ask for a summary of thoughts, or for thoughts to send back, is to ask for
    thoughts."""
    reasoning = fields.nested("reasoning")
    effort = reasoning.choice("effort", tuple(EFFORTS))
    summary = reasoning.choice("summary", ("auto", "concise", "detailed", "none"), "none")
    wanted = summary != "none" or ENCRYPTED in fields.items("include", str, 64)
    return settled(None, EFFORTS[effort] if effort else None, wanted)


def _messages(fields: Fields, tools: ResponsesTools) -> list[dict[str, Any]]:
    given = fields.get("input")
    if given is None:
        raise missing("input")
    reader = _Reader(tools)
    if instructions := fields.text("instructions", longest=2**31):
        reader.messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        reader.messages.append({"role": "user", "content": given})
        return reader.messages
    items = fields.items("input", dict, MAX_ITEMS)
    for i, item in enumerate(items):
        reader.read(Fields(item, f"input[{i}]."))
    if not reader.messages:
        what = f"has nothing that the model reads ({tools.left_out[-1]})" if items else "is empty"
        raise RequestError(f"input {what}; it needs at least one message", "input", "invalid_value", 400)
    return reader.messages


class _Reader:
    """Items to messages."""

    def __init__(self, tools: ResponsesTools) -> None:
        self.messages: list[dict[str, Any]] = []
        self._tools = tools

    def read(self, item: Fields) -> None:
        """Adds what an item says. Hosted tools leave items whose texts are elsewhere; they are passed over."""
        kind = item.text("type") or ("message" if item.get("role") is not None else None)
        if kind is None:
            raise missing(f"{item.where}type")
        if kind == "item_reference":
            text = "items are not stored here; send the item itself"
            raise RequestError(
                f"{item.where}type is {show(kind)}; {text}", f"{item.where}type", "unsupported_field", 400
            )
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            self._reasoning(item)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, custom=kind == "custom_tool_call")
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = _text(item.get("output"), f"{item.where}output")
            self.messages.append({"role": "tool", "tool_call_id": _call_id(item), "content": output})
        else:
            self._tools.left_out.append(f"input items of type {show(kind)} were left out")

    def _message(self, item: Fields) -> None:
        role = item.choice("role", _ROLES)
        if role is None:
            raise missing(f"{item.where}role")
        if item.get("content") is None:
            raise missing(f"{item.where}content")
        content = _text(item.get("content"), f"{item.where}content")
        if role == "assistant":
            self._answer()["content"] += "".join(part["text"] for part in content)
        else:
            self.messages.append({"role": role, "content": content})

    def _answer(self) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]

    def _reasoning(self, item: Fields) -> None:
        parts = parts_of(item.get("content"), f"{item.where}content")
        thought = "".join(text_of(part) for _, _, part in parts) or unsealed(item.get("encrypted_content"))
        answer = self._answer()
        answer["reasoning_content"] = answer.get("reasoning_content", "") + thought

    def _call(self, item: Fields, *, custom: bool) -> None:
        name = item.text("name")
        if not name:
            raise missing(f"{item.where}name")
        given = item.text("input" if custom else "arguments", "", longest=2**31)
        function = {
            "name": shown_name(name, item.text("namespace")),
            "arguments": {"input": given} if custom else given or "{}",
        }
        call = {"id": _call_id(item), "type": "function", "function": function}
        self._answer().setdefault("tool_calls", []).append(call)


def _call_id(item: Fields) -> str:
    call_id = item.text("call_id")
    if not call_id:
        raise missing(f"{item.where}call_id")
    return call_id


def _text(content: Any, where: str) -> list[dict[str, Any]]:
    """A content as text parts."""
    texts = []
    for kind, path, part in parts_of(content, where):
        if kind not in _TEXTS:
            raise unread(kind, path, _READ)
        texts.append({"type": "text", "text": text_of(part, _TEXTS[kind])})
    return texts
