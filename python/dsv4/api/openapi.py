"""`GET /openapi.json`: this server's endpoints, their bodies, answers and refusals as an OpenAPI document, made of the limits that the
handlers themselves use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import dsv4
from dsv4.api.dialect import OF_A_BODY, OF_A_GENERATION, Dialect, Operation
from dsv4.api.dialects import DIALECTS
from dsv4.api.info import json_response, service_of
from dsv4.api.openapi_answers import ANSWERS, error_of
from dsv4.api.openapi_requests import request_schemas
from dsv4.api.schema import ref
from dsv4.api.service import Service

OpenApi = dict[str, Any]

_REASONS = {
    400: "A value that is not taken; the message names the field, the value and what it takes.",
    401: "The API key is missing or wrong.",
    403: "The server was not started for it.",
    404: "There is no such model, or no such thing.",
    409: "Not in the state that the server is in.",
    408: "The request took too long to arrive.",
    413: "The body is larger than the server takes.",
    415: "The body is packed.",
    429: "As many requests wait as may; try again.",
    431: "The header is larger than the server takes.",
    500: "The generation failed.",
    503: "The server starts, stops, or has no connection left; try again.",
}
_OF_OPERATORS = (403, 500)
_ALWAYS = (400, 401, 408, 431, 503)
_FLUSH = "Forgets what no request uses"
_OTHERS: Mapping[tuple[str, str], Operation] = {
    ("post", "/v1/prefixes"): Operation(
        "Computes a prompt and keeps it", "Pinned", "PrefixRequest", OF_A_GENERATION, example={"prompt": "Hi"}
    ),
    ("delete", "/v1/prefixes/{id}"): Operation(
        "Keeps a prompt no longer", "Unpinned", errors=(403, 404), path="The id that POST /v1/prefixes gave."
    ),
    ("delete", "/v1/sessions/{key}"): Operation(
        "A session is over", "SessionOver", errors=(400, 403), path="The session's `prompt_cache_key`."
    ),
    ("get", "/v1/models"): Operation("What is served", "Models"),
    ("get", "/v1/models/{name}"): Operation(
        "One of the models", "Model", errors=(400, 404), path="Its name."
    ),
    ("post", "/tokenize"): Operation(
        "Text or a chat as token ids", "Tokens", "TokenizeRequest", OF_A_BODY, example={"prompt": "Hi"}
    ),
    ("post", "/detokenize"): Operation(
        "Token ids as text", "Text", "DetokenizeRequest", OF_A_BODY, tenant=False, example={"tokens": [5, 6]}
    ),
    ("get", "/tokenizer_info"): Operation("The tokenizer's special tokens", "TokenizerInfo", errors=(400,)),
    ("get", "/dump"): Operation("The core's state between two steps", "Dump", errors=_OF_OPERATORS),
    ("get", "/admin/cache"): Operation(
        "What the cache holds, for whom, and what is pinned", "Object", errors=_OF_OPERATORS
    ),
    ("post", "/admin/cache/flush"): Operation(_FLUSH, "Flushed", errors=_OF_OPERATORS),
    ("post", "/flush_cache"): Operation(f"{_FLUSH}, by SGLang's name", "Flushed", errors=_OF_OPERATORS),
    ("post", "/reset_prefix_cache"): Operation(f"{_FLUSH}, by vLLM's name", "Flushed", errors=_OF_OPERATORS),
    ("get", "/admin/tenants"): Operation(
        "Limits of tenants and what is left of them", "Object", errors=_OF_OPERATORS
    ),
    ("post", "/admin/drain"): Operation("Takes no new requests", "Draining", errors=_OF_OPERATORS),
    ("post", "/admin/resume"): Operation("Takes requests again", "Draining", errors=(*_OF_OPERATORS, 409)),
    ("get", "/admin/requests/{id}"): Operation(
        "What a request that runs reused, and why not more",
        "Explained",
        errors=(*_OF_OPERATORS, 404),
        path="Its id.",
    ),
    ("post", "/admin/profile"): Operation(
        "Traces some steps into a file",
        "Profiled",
        "ProfileRequest",
        (*OF_A_GENERATION, 409),
        tenant=False,
        example={"steps": 4},
    ),
    ("get", "/admin/dump"): Operation("/dump for operators", "Dump", errors=_OF_OPERATORS),
    ("get", "/health"): Operation(
        "Whether requests are taken and make progress", "Health", also={503: "Health"}
    ),
    ("get", "/metrics"): Operation("For Prometheus", None, errors=(403,), media="text/plain"),
    ("get", "/stats"): Operation("What the server does now", "Object", errors=(403,)),
    ("get", "/page/{name}"): Operation(
        "A file of the page",
        None,
        errors=(404,),
        media="text/html",
        other="text/javascript",
        path="Its name.",
    ),
    ("get", "/version"): Operation("The version", "Version"),
    ("get", "/openapi.json"): Operation("This document", "OpenApi"),
    ("get", "/"): Operation("What this is; for browsers the page", "Root", other="text/html"),
}
"""What no dialect has, by method and path."""


def operations(dialects: Sequence[Dialect]) -> dict[tuple[str, str], Operation]:
    """Every operation of a server with these dialects, by method and path."""
    posts = (post for dialect in dialects for post in dialect.posts)
    return {("post", post.path): post.operation for post in posts} | dict(_OTHERS)


OPERATIONS = operations(DIALECTS)
"""Of the dialects that are served."""

_TENANT = {
    "name": "x-dsv4-tenant",
    "in": "header",
    "description": "Whose share of the prefill it uses; goes before the body's `user`.",
    "schema": {"type": "string", "maxLength": 512},
}
_VERSION = {
    "name": "anthropic-version",
    "in": "header",
    "description": "Its presence asks for Anthropic's shapes; any version is taken.",
    "schema": {"type": "string"},
}
_REQUEST_ID = {
    "x-request-id": {"schema": {"type": "string"}, "description": "The client's, if it sent a plain one."}
}


def document(service: Service, dialects: Sequence[Dialect] = DIALECTS) -> OpenApi:
    """The document of one server that has these dialects."""
    paths: dict[str, dict[str, Any]] = {}
    keyed = service.callers.keys.required
    for (method, path), operation in operations(dialects).items():
        paths.setdefault(path, {})[method] = _operation(method, path, operation, keyed)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    schemas = {**request_schemas(service.vocab_size), **ANSWERS, "OpenApi": {"type": "object"}}
    for dialect in dialects:
        schemas |= dialect.schemas
    components: dict[str, Any] = {"schemas": schemas} | ({"securitySchemes": schemes} if keyed else {})
    about = {
        "title": "dsv4",
        "version": dsv4.__version__,
        "summary": "Serves DeepSeek-V4 in OpenAI's and Anthropic's dialects",
    }
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": components}


def _operation(method: str, path: str, operation: Operation, keyed: bool) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_") or "root"
    made: dict[str, Any] = {"operationId": f"{method}_{name}", "summary": operation.summary}
    made["parameters"] = [] if operation.error == "AnthropicError" else [_VERSION]
    if operation.path is not None:
        found = path[path.index("{") + 1 : path.index("}")]
        schema = {"type": "string", "minLength": 1}
        told = {
            "name": found,
            "in": "path",
            "required": True,
            "description": operation.path,
            "schema": schema,
        }
        made["parameters"].append(told)
    if operation.body is not None:
        made["parameters"] += [_TENANT] if operation.tenant else []
        content: dict[str, Any] = {"schema": ref(operation.body)}
        content |= {} if operation.example is None else {"example": dict(operation.example)}
        made["requestBody"] = {"required": True, "content": {"application/json": content}}
    made["responses"] = _responses(operation)
    if keyed and path != "/health" and not path.startswith("/page/"):
        made["security"] = [{"bearer": []}, {"x-api-key": []}]
    return made


def _responses(operation: Operation) -> dict[str, Any]:
    schema = {"type": "string"} if operation.answer is None else ref(operation.answer)
    content: dict[str, Any] = {operation.media: {"schema": schema}}
    if operation.other is not None:
        content |= {
            media: {"schema": {"type": "string"}} for media in (operation.other, "text/css", "image/svg+xml")
        }
    if operation.streams is not None:
        content["text/event-stream"] = {"schema": {**ref("Event"), "description": operation.streams}}
    found: dict[int, Any] = {200: {"description": "The answer", "headers": _REQUEST_ID, "content": content}}
    for status in sorted({*operation.errors, *_ALWAYS}):
        found[status] = {"description": _REASONS[status], "content": error_of(operation.error)}
    for status, schema_name in (operation.also or {}).items():
        content = {"application/json": {"schema": {"anyOf": [ref(schema_name), ref("Error")]}}}
        found[status] = {"description": _REASONS[status], "content": content}
    return {str(status): told for status, told in found.items()}


async def openapi(request: Request) -> Response:
    """The handler."""
    return json_response(document(service_of(request), request.app.state.dialects))
