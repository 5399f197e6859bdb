"""Tools that take text in place of JSON (`type: custom`), in chats and in the Responses API.

The model sees a function with one parameter `input`. The grammar of a tool is shown to it, and holds what it writes.
"""

from __future__ import annotations

import json
from typing import Any

from dsv4.api.fields import Fields
from dsv4.api.grammar import text_form
from dsv4.api.parts import missing
from dsv4.text.form import Format
from dsv4.text.lark import ends_before

_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def read_custom(tool: Fields) -> tuple[dict[str, Any], Format | None, str | None]:
    """(The function that the model sees, what holds the text, what of it cannot be held). Raises RequestError."""
    if not (name := tool.text("name")):
        raise missing(f"{tool.where}name")
    description, rule = tool.text("description", longest=2**31), tool.nested("format")
    form, left_out = None, None
    if rule.choice("type", ("text", "grammar"), "text") == "grammar":
        rule = rule.nested("grammar") if rule.get("grammar") is not None else rule  # as chats have it
        syntax, definition = rule.choice("syntax", ("lark", "regex")), rule.text("definition", longest=2**31)
        if syntax is None or not definition:
            raise missing(f"{rule.where}{'definition' if syntax else 'syntax'}")
        form = text_form(syntax, definition, f"{rule.where}definition")
        description = f"{description or ''}\n\nThe input follows this {syntax} grammar:\n{definition}"
        if form.kind == "lark" and not ends_before(form.value, "</"):
            form = None
            left_out = f"the grammar of tool {name!r} is shown to the model but not enforced, as it takes what ends the input too"
    function: dict[str, Any] = {"name": name} | ({} if description is None else {"description": description})
    return function | {"parameters": _INPUT}, form, left_out


def as_function(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A chat's call of a custom tool as one of a function. Raises RequestError."""
    custom = Fields(call, where).nested("custom")
    if not (name := custom.text("name")):
        raise missing(f"{custom.where}name")
    arguments = {"input": custom.text("input", "", longest=2**31)}
    return {"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def input_of(arguments: str) -> str:
    """The text in a call's arguments, as far as it is there."""
    for end in ("", "}", '"}'):
        try:
            given = json.loads(arguments + end)
        except ValueError:
            continue
        text = given.get("input") if isinstance(given, dict) else None
        return text if isinstance(text, str) else arguments
    return ""
