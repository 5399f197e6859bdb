"""Message contents: a text, or a list of typed parts of which this model reads those that are text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.api.fields import Fields, refuse
from dsv4.errors import RequestError, show


def parts_of(content: Any, where: str) -> Iterator[tuple[str, str, Fields]]:
    """(Type, path, part) of each part of a content; a text is one part of type `text`. `where`: the path of the content.
    Raises RequestError for what is neither text nor a list of objects."""
    if content is None:
        return
    if isinstance(content, str):
        yield "text", where, Fields({"type": "text", "text": content}, f"{where}.")
        return
    if not isinstance(content, list):
        raise refuse(where, content, "text or a list of parts")
    for i, part in enumerate(content):
        path = f"{where}[{i}]"
        if not isinstance(part, Mapping):
            raise refuse(path, part, "an object with a type")
        fields = Fields(part, f"{path}.")
        kind = fields.text("type")
        if kind is None:
            raise missing(f"{path}.type")
        yield kind, path, fields


def text_of(part: Fields, field: str = "text") -> str:
    """The text of a part. Raises RequestError where there is none."""
    text = part.text(field, longest=2**31)
    if text is None:
        raise missing(part.where + field)
    return text


def missing(field: str) -> RequestError:
    """The error for a field that has to be there."""
    return RequestError(f"{field} is missing", field, "missing_field", 400)


def unread(kind: str, where: str, takes: str) -> RequestError:
    """The error for a part of a type that is not read."""
    text = f"{where}.type is {show(kind)}; this model reads text only: it takes {takes}"
    return RequestError(text, f"{where}.type", "unsupported_content", 400)
