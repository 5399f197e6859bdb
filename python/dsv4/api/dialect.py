"""What a dialect says of itself: its endpoints, and their bodies, answers and errors for the document at `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4.api.errors import ErrorBody, error_body
from dsv4.api.http import Handler
from dsv4.api.schema import Schema

OF_A_BODY = (400, 403, 404, 408, 413, 415, 429)
"""Statuses of errors of what takes a body."""
OF_A_GENERATION = (*OF_A_BODY, 500)
"""And of what generates."""
EVENTS = "Server-sent events"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path, as the document tells it."""

    summary: str
    answer: str | None
    """Schema of a whole answer; None for text."""
    body: str | None = None
    errors: tuple[int, ...] = ()
    streams: str | None = None
    """What a stream of it holds."""
    error: str = "Error"
    """Schema of an error."""
    media: str = "application/json"
    other: str | None = None
    """Another media type of the answer, which browsers are given."""
    path: str | None = None
    """What the part of the path in braces is."""
    tenant: bool = True
    """It is done for a tenant."""
    also: Mapping[int, str] | None = None
    """Other statuses with a body of their own, by schema."""
    example: Mapping[str, Any] | None = None
    """A body that is answered. The document shows it, and tests begin with it."""


@dataclass(frozen=True, slots=True)
class Post:
    """An endpoint that takes a body."""

    path: str
    handler: Handler
    operation: Operation
    generates: bool = False
    """Refused while the server drains."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One value in a dialect's file, and its name in `dialects.py`: nothing else knows the dialect."""

    posts: tuple[Post, ...]
    errors: ErrorBody = error_body
    """The shape of its errors."""
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    """What its operations name and the document does not have yet, by name."""
