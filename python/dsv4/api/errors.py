"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. Other dialects have their own `ErrorBody` for
the same RequestError."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import Scope

from dsv4.errors import RequestError

RETRY_AFTER = {429: b"1", 503: b"5"}
"""Seconds in `Retry-After`, by status: a full queue moves with every finished request, a restart takes
longer."""

ErrorBody = Callable[[RequestError, str], dict[str, Any]]
"""The JSON of an error and the id of its request, in the shape of a dialect."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError, request_id: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def shaped(scope: Scope, error: RequestError, request_id: str) -> dict[str, Any]:
    """The JSON of an error as the client of a request reads it; the edge has put the shape there."""
    body: ErrorBody = scope.get("dsv4_error_body", error_body)
    return body(error, request_id)


def retry_headers(error: RequestError) -> tuple[tuple[bytes, bytes], ...]:
    """`Retry-After` of an error after which to try again; nothing for others."""
    if error.retry_after is not None:
        return ((b"retry-after", b"%d" % max(math.ceil(error.retry_after), 1)),)
    return ((b"retry-after", RETRY_AFTER[error.status]),) if error.status in RETRY_AFTER else ()


def error_event(error: RequestError) -> bytes:
    """The terminal event of a stream that failed half-way, so that no client takes a cut for an end."""
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\ndata: [DONE]\n\n"


def internal_error(request_id: str) -> RequestError:
    """What a client sees of a bug: no traceback, but the id under which the log has it."""
    return RequestError(
        f"internal error; the server's log has it under request id {request_id}", None, "internal_error", 500
    )
