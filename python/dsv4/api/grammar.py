"""Where requests ask for an answer of a certain form, which takes constrained decoding: formats, and calls that must be made.

That is not here yet, and to accept a schema and not to keep it would be a lie, so all of it is refused by name. Every
dialect comes through these functions, which are to give a grammar once there is one.
"""

from __future__ import annotations

from dsv4.api.fields import Fields, refuse
from dsv4.errors import RequestError


def check_format(wanted: Fields) -> None:
    """An object with a `type` that says what form the answer is to have: only plain text."""
    kind, field = wanted.text("type"), f"{wanted.where}type"
    if kind is None:
        if any(value is not None for value in wanted.body.values()):
            raise RequestError(f"{field} is missing; it takes 'text'", field, "missing_field", 400)
    elif kind != "text":
        raise refuse(field, kind, "'text'", "; structured output is not supported")


def tools_wanted(fields: Fields) -> bool:
    """OpenAI's `tool_choice`: whether the model gets to see the tools."""
    choice = fields.get("tool_choice")
    if type(choice) is dict or choice == "required":
        raise refuse("tool_choice", choice, "'none' or 'auto'", _FORCED)
    return fields.choice("tool_choice", ("none", "auto"), "auto") != "none"


def anthropic_tools_wanted(choice: Fields) -> bool:
    """The same of Anthropic's, which is an object."""
    kind = choice.choice("type", ("auto", "none", "any", "tool"), "auto")
    if kind in ("any", "tool"):
        raise refuse(f"{choice.where}type", kind, "'auto' or 'none'", _FORCED)
    return kind != "none"


_FORCED = "; forced calls are not supported"
