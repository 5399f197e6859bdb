"""A body in Anthropic's dialect as a conversation, in the shape that the encoder takes.

Fields, betas and block types come and go with every release of Anthropic's clients. What is unknown is passed over; what
would change the answer and cannot be done is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dsv4.api.conversation import EFFORTS, MAX_MESSAGES, MAX_TOOLS, Conversation, settled
from dsv4.api.fields import Fields, refuse
from dsv4.api.grammar import anthropic_choice, format_of
from dsv4.api.http import Call, header
from dsv4.api.noise import without_noise
from dsv4.api.parts import missing, parts_of, text_of, unread
from dsv4.api.routing import routing_of
from dsv4.api.thoughts import unsealed
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError, show
from dsv4.text.chat import Ending
from dsv4.text.form import Format

SESSION_HEADER = b"x-claude-code-session-id"

_READ = "text, thinking, tool_use and tool_result"
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}

Message = dict[str, Any]


def read_messages(fields: Fields) -> tuple[Conversation, list[str]]:
    """The conversation of a body, and what of it was left out. Raises RequestError."""
    _check_refused(fields)
    if fields.get("messages") is None:
        raise missing("messages")
    system = _texts(fields.get("system"), "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(fields.items("messages", dict, MAX_MESSAGES)):
        _add_message(messages, Fields(message, f"messages[{i}]."), f"messages[{i}].content")
    messages = without_noise(messages)
    tools, left_out = _tools(fields)
    choice = anthropic_choice(fields.nested("tool_choice")).among(tools)
    thinking, effort = _thinking(fields)
    return Conversation(
        messages,
        tools if choice.tools else [],
        thinking,
        effort,
        _ending(messages),
        fields.nested("chat_template_kwargs").boolean("drop_thinking", True),
        parallel_calls=not fields.nested("tool_choice").boolean("disable_parallel_tool_use"),
        choice=choice,
        format=_format(fields),
    ), left_out


def routing_for(call: Call) -> Routing:
    """`metadata.user_id` is the tenant, in Claude Code with the session; a header of Claude Code names it too."""
    routing, user = routing_of(call), call.fields.nested("metadata").text("user_id", "", longest=4096) or ""
    session: Any = header(call.scope, SESSION_HEADER)
    if user.startswith("{"):  # JSON with device_id, account_uuid and session_id
        try:
            about = json.loads(user)
            session = session or about.pop("session_id", None)
            user = next(
                (v for v in map(about.get, ("account_uuid", "device_id")) if isinstance(v, str) and v), ""
            )
        except (ValueError, RecursionError):
            user = ""
    elif "_session_" in user:
        user, _, found = user.rpartition("_session_")
        session = session or found
    return dataclasses.replace(
        routing,
        tenant=routing.tenant or user[:512],
        session=routing.session or (session[:512] if isinstance(session, str) and session else None),
    )


def _check_refused(fields: Fields) -> None:
    """What changes the answer and cannot be done."""
    if servers := fields.get("mcp_servers"):
        raise refuse(
            "mcp_servers", servers, "nothing", "; this server calls no others: give the tools in tools"
        )


def _format(fields: Fields) -> Format | None:
    """By its older name and by the newer one."""
    old, new = (
        format_of(holder)
        for holder in (fields.nested("output_format"), fields.nested("output_config").nested("format"))
    )
    return new or old


def _add_message(messages: list[Message], message: Fields, where: str) -> None:
    """Appends what a message says: one of the encoder's, or several where it holds tool results."""
    role = message.choice("role", ("user", "assistant", "system"))
    if role is None:
        raise missing(f"{message.where}role")
    content = message.get("content")
    if content is None:
        raise missing(where)
    if role == "system":
        messages.append({"role": "system", "content": _texts(content, where)})
    elif role == "assistant":
        _add_answer(messages, content, where)
    else:
        _add_question(messages, content, where)


def _add_question(messages: list[Message], content: Any, where: str) -> None:
    texts: list[dict[str, Any]] | None = None
    for kind, path, part in parts_of(content, where):
        if kind == "tool_result":
            id = part.text("tool_use_id")
            if not id:
                raise missing(f"{path}.tool_use_id")
            result = _texts(part.get("content"), f"{path}.content")
            messages.append({"role": "tool", "tool_call_id": id, "content": result})
            texts = None
            continue
        if texts is None:
            texts = []
            messages.append({"role": "user", "content": texts})
        texts.append({"type": "text", "text": _text(kind, path, part)})
    if content in ("", []):
        messages.append({"role": "user", "content": ""})


def _add_answer(messages: list[Message], content: Any, where: str) -> None:
    """Adds to the assistant's message at the end, as Anthropic joins neighbours, or begins one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    answer = messages[-1]
    for kind, path, part in parts_of(content, where):
        if kind == "text":
            answer["content"] += text_of(part)
        elif kind == "thinking":
            thought = part.text("thinking", "", longest=2**31) or unsealed(part.get("signature"))
            answer["reasoning_content"] = answer.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            answer.setdefault("tool_calls", []).append(_call(path, part))
        elif kind in ("image", "document"):
            raise unread(kind, path, _READ)
        # Others are what Anthropic's own servers did (redacted thoughts, their searches): there is no text of it.


def _call(path: str, part: Fields) -> dict[str, Any]:
    id, name, given = part.text("id"), part.text("name"), part.get("input")
    if not id or not name:
        raise missing(f"{path}.{'name' if id else 'id'}")
    if given is not None and not isinstance(given, dict):
        raise refuse(f"{path}.input", given, "an object")
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given or {}}}


def _texts(content: Any, where: str) -> list[dict[str, Any]]:
    """A content that holds text alone, as parts."""
    return [{"type": "text", "text": _text(*part)} for part in parts_of(content, where)]


def _text(kind: str, path: str, part: Fields) -> str:
    if kind == "text":
        return text_of(part)
    if kind == "document" and part.nested("source").get("type") == "text":
        return text_of(part.nested("source"), "data")
    if kind == "search_result":
        return "\n\n".join(text_of(one) for _, _, one in parts_of(part.get("content"), f"{path}.content"))
    if kind == "tool_reference":
        return text_of(part, "tool_name")
    raise unread(kind, path, _READ)


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], list[str]]:
    """Tools in OpenAI's shape. Those that Anthropic hosts or has trained its models on have a type of their own and no
    schema; they are left out."""
    tools, left_out = [], []
    for i, tool in enumerate(fields.items("tools", dict, MAX_TOOLS)):
        given = Fields(tool, f"tools[{i}].")
        name, kind = given.text("name"), given.text("type", "custom")
        if given.get("input_schema") is None and kind != "custom":
            left_out.append(f"tool {show(name)} of type {show(kind)} is unknown to V4 and was left out")
            continue
        if not name:
            raise missing(f"tools[{i}].name")
        function: dict[str, Any] = {"name": name}
        if (description := given.text("description", longest=2**31)) is not None:
            function["description"] = description
        if given.get("input_schema") is not None:
            function["parameters"] = given.nested("input_schema").body
        if given.boolean("strict"):
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    return tools, left_out


def _thinking(fields: Fields) -> tuple[bool, str]:
    thinking = fields.nested("thinking")
    kind = thinking.choice("type", tuple(_THINKING))
    thinking.text("display")
    config = fields.nested("output_config")
    effort = config.choice("effort", tuple(EFFORTS))
    return settled(None if kind is None else _THINKING[kind], EFFORTS[effort] if effort else None)


def _ending(messages: list[Message]) -> Ending:
    """An assistant's message at the end is to be continued, unless it called tools."""
    if not messages:
        raise RequestError(
            "messages is empty; it needs at least one message", "messages", "invalid_value", 400
        )
    last = messages[-1]
    said = last["role"] == "assistant" and not last.get("tool_calls") and last["content"]
    return "continued" if said else "opened"
