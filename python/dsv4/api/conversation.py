"""A chat request's messages, tools and thinking settings, checked and encoded as a prompt. Dialects share
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4.api.fields import Fields, kind, refuse
from dsv4.api.service import Service
from dsv4.errors import RequestError
from dsv4.text.chat import encode_chat

MAX_MESSAGES = 65536
MAX_TOOLS = 1024

EFFORTS = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
"""What clients call an effort, and which of V4's it is: DeepSeek's own mapping. `none` turns thinking off."""

DEFAULT_EFFORT = "low"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What `encode` needs."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    effort: str


def read_conversation(fields: Fields) -> Conversation:
    """Messages, tools and thinking out of a body in OpenAI's shape. Raises RequestError."""
    messages = fields.get("messages")
    if messages is None:
        raise RequestError(
            "messages is missing; it takes a list of messages", "messages", "missing_field", 400
        )
    messages = fields.items("messages", dict, MAX_MESSAGES)
    for i, message in enumerate(messages):
        _check_message(Fields(message, f"messages[{i}]."))
    thinking, effort = _thinking(fields)
    return Conversation(messages, _tools(fields), thinking, effort)


def _check_message(message: Fields) -> None:
    """What the encoder takes for granted; roles and contents it checks itself."""
    message.text("reasoning_content", longest=2**31)
    message.text("reasoning", longest=2**31)
    message.text("tool_call_id")
    for j, call in enumerate(message.items("tool_calls", dict, MAX_TOOLS)):
        function = Fields(call, f"{message.where}tool_calls[{j}].").nested("function")
        if not function.text("name"):
            raise RequestError(
                f"{function.where}name is missing", f"{function.where}name", "missing_field", 400
            )
        arguments = function.get("arguments")
        if arguments is not None and type(arguments) not in (str, dict):
            raise refuse(f"{function.where}arguments", arguments, "a JSON object as text")


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that the model gets to see: none of them when `tool_choice` says so."""
    tools = fields.items("tools", dict, MAX_TOOLS)
    choice = fields.get("tool_choice")
    if type(choice) is dict or choice == "required":
        raise refuse("tool_choice", choice, "'none' or 'auto'", "; forced calls are not supported")
    choice = fields.choice("tool_choice", ("none", "auto"), "auto")
    for i, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            raise refuse(f"tools[{i}].type", tool["type"], "'function'")
        Fields(tool, f"tools[{i}].").nested("function")
    return [] if choice == "none" else tools


def _thinking(fields: Fields) -> tuple[bool, str]:
    """(thinking, effort) from DeepSeek's `thinking`, OpenAI's `reasoning_effort` and the template arguments
    of vLLM.

    Off unless asked for; naming an effort asks for it. The most explicit wins: a switch before an effort.
    """
    template = fields.nested("chat_template_kwargs")
    name = fields.choice("reasoning_effort", tuple(EFFORTS)) or template.choice(
        "reasoning_effort", tuple(EFFORTS)
    )
    effort = EFFORTS[name] if name is not None else None
    switch = fields.get("thinking")
    if type(switch) is not bool:
        mode = fields.nested("thinking").choice("type", ("enabled", "disabled", "adaptive", "auto"))
        switch = None if mode in (None, "auto") else mode != "disabled"
    for key in ("thinking", "enable_thinking"):
        if switch is None and template.get(key) is not None:
            switch = template.boolean(key)
    thinking = switch if switch is not None else effort not in (None, "none")
    return thinking, effort if effort not in (None, "none") else DEFAULT_EFFORT


async def encode(service: Service, chat: Conversation) -> list[int]:
    """The prompt's token ids; long chats are encoded off the event loop."""
    tokenizer = service.tokenizer("messages")

    def work() -> list[int]:
        segments = encode_chat(
            chat.messages,
            thinking=chat.thinking,
            tools=chat.tools or None,
            effort=chat.effort,
            format=service.engine.chat_format,
        )
        return tokenizer.encode_segments(segments)

    try:
        return await service.off_loop(work, size=sum(_size(m) for m in chat.messages) + 512 * len(chat.tools))
    except RecursionError:
        raise RequestError(
            "messages hold JSON that nests too deep", "messages", "invalid_value", 400
        ) from None


def _size(message: dict[str, Any]) -> int:
    """Characters, roughly; only whether it is long matters."""
    content = message.get("content")
    extra = 512 * len(message.get("tool_calls") or ())
    if isinstance(content, list):
        return extra + sum(
            len(p.get("text") or "") if type(p) is dict and kind(p.get("text")) == "text" else 0
            for p in content
        )
    return extra + (len(content) if isinstance(content, str) else 0)
