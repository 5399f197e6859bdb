"""The ASGI application: routes, and around them what every request passes through."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.api import admin, anthropic, info, prefixes, static, stats
from dsv4.api.absent import why_absent
from dsv4.api.caller import Caller
from dsv4.api.dialects import DIALECTS
from dsv4.api.errors import ErrorBody, error_body, internal_error, retry_headers, shaped
from dsv4.api.http import Handler, PostEndpoint, header
from dsv4.api.openapi import openapi
from dsv4.api.protocol import GuardedProtocol
from dsv4.api.request_log import OTHER, PROBES, Record, new_request_id
from dsv4.api.service import Service
from dsv4.errors import RequestError
from dsv4.spelling import nearest

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key, for probes. Everything else but the page is closed when a key is set, whatever is added
later."""

MONITORING = frozenset({"/metrics", "/stats", "/dump"})
"""What tells a tenant of others, and so is not for every key in a file of tenants."""

EXPOSED = (
    "x-request-id",
    "retry-after",
    "x-dsv4-warning",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
)
"""Headers that a web page of another origin may read."""


class TextConvertor(PathConvertor):
    """Whatever a client calls something, slashes and line ends too, on which `path` stops."""

    regex = "(?s:.*)"


register_url_convertor("text", TextConvertor())


def create_app(service: Service) -> ASGIApp:
    """The application around one engine. Dialects are listed in `dialects.py`."""
    app = Starlette(
        routes=[
            *(
                _post(post.path, post.handler, generates=post.generates, errors=dialect.errors)
                for dialect in DIALECTS
                for post in dialect.posts
            ),
            _post("/v1/prefixes", prefixes.pin, generates=True),
            Route("/v1/prefixes/{id}", prefixes.unpin, methods=["DELETE"]),
            Route("/v1/sessions/{key:text}", prefixes.end_session, methods=["DELETE"]),
            Route("/v1/models", info.models),
            Route("/v1/models/{name:text}", info.one_model),
            _post("/tokenize", info.tokenize),
            _post("/detokenize", info.detokenize),
            Route("/tokenizer_info", info.tokenizer_info),
            Route("/dump", info.dump),
            Route("/admin/cache", admin.cache),
            *(
                Route(path, admin.flush, methods=["POST"])
                for path in (*sorted(admin.ALIASES), "/admin/cache/flush")
            ),
            Route("/admin/tenants", admin.tenants),
            Route("/admin/drain", admin.drain, methods=["POST"]),
            Route("/admin/resume", admin.resume, methods=["POST"]),
            Route("/admin/requests/{id:text}", admin.explain),
            _post("/admin/profile", admin.profile),
            Route("/admin/dump", admin.dump),
            Route("/health", info.health),
            Route("/metrics", info.metrics),
            Route("/stats", stats.stats),
            Route("/version", info.version),
            Route("/page/{name}", static.part),
            Route("/openapi.json", openapi),
            Route("/", info.root),
        ],
        exception_handlers={HTTPException: _http_error, RequestError: _request_error, Exception: _bug},
    )
    app.state.service, app.state.dialects = service, DIALECTS
    routes = [route for route in app.routes if isinstance(route, Route)]
    service.metrics.declare((route.path, sorted(route.methods or ())) for route in routes)
    # By endpoint, as not every version of Starlette says which route it took.
    return Edge(app, service, {route.endpoint: route.path for route in routes})


def _post(path: str, handler: Handler, *, generates: bool = False, errors: ErrorBody = error_body) -> Route:
    return Route(path, PostEndpoint(handler, generates=generates, errors=errors), methods=["POST"])


class Edge:
    """Request ids, the key, and the count of responses. Plain ASGI: one extra call per message."""

    def __init__(self, app: ASGIApp, service: Service, paths: Mapping[Any, str]) -> None:
        self.app, self.service, self._paths = app, service, paths
        self._known = frozenset(paths.values())
        self._shapes = {
            path: endpoint.errors for endpoint, path in paths.items() if isinstance(endpoint, PostEndpoint)
        }
        # What a cache keeps for one origin is not for another; Starlette says so in every answer from 1.8 on only.
        self._varies = bool(service.config.allow_origin) and "*" not in service.config.allow_origin
        self._inner: ASGIApp = self._guarded
        if service.config.allow_origin:
            # Around the key: a browser asks for leave without one, and reads a refusal only with these headers.
            self._inner = CORSMiddleware(
                self._guarded,
                allow_origins=service.config.allow_origin,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = _record_of(scope)
        scope["dsv4_record"], scope["dsv4_error_body"] = record, self._shape(scope)
        try:
            await self._inner(scope, receive, self._sending(scope, record, send))
        except asyncio.CancelledError:
            record.reason = "shutdown"
            raise
        except Exception:  # answered by the application, which raises it again for the log
            record.reason = "internal_error"
            raise
        finally:
            path = scope["path"] if scope["path"] in self._known else OTHER  # refused before it was routed
            record.route = self._paths.get(scope.get("endpoint"), path)
            record.end(self.service.metrics)
            self.service.recent.add(record)
            if self.service.tracer is not None:
                self.service.tracer.ended(record, scope)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: GuardedProtocol | None = scope.get("dsv4_connection")
        if connection is not None and connection.over and scope["path"] not in PROBES:
            self.service.connections.refuse()
            refused = _too_many(self.service.connections.most)
            await _error(scope, refused)(scope, receive, send)
            return
        caller = self.service.callers.of(scope)
        if caller is not None:
            scope["dsv4_caller"], record = caller, scope["dsv4_record"]
            record.tenant = caller.tenant.name
        elif not _is_open(scope):
            text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            refused = RequestError(text, None, "invalid_api_key", 401)
            await _error(scope, refused, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        if caller is not None and (refused := self._beyond_rights(caller, scope["path"])) is not None:
            await _error(scope, refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _beyond_rights(self, caller: Caller, path: str) -> RequestError | None:
        """What to say to who asks for something that a key of another kind opens."""
        if admin.is_admin(path) and not caller.admin:
            known = self.service.callers.keys.has_admin
            text = (
                f"{_short(path)} takes an admin's key"
                if known
                else "this server has no admin's key, so /admin is closed"
            )
            how = (
                "send one"
                if known
                else "start it with --admin-key, or a tenant with admin = true in --keys-file"
            )
            return RequestError(f"{text}; {how}", None, "admin_required", 403)
        if path in MONITORING and not caller.monitor:
            text = f"{path} has the figures of all tenants; `monitor = true` in the file of keys opens it for this one"
            return RequestError(text, None, "monitor_required", 403)
        return None

    def _sending(self, scope: Scope, record: Record, send: Send) -> Send:
        """Adds to the head of an answer. A request that is not read to its end costs the connection."""
        connection: GuardedProtocol | None = scope.get("dsv4_connection")

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
                # One that is kept would bring a balancer's next request to a server that is gone.
                ending = self.service.ending
                if connection is not None and (connection.has_unread or connection.over or ending):
                    headers.append((b"connection", b"close"))
                if self._varies and not any(name.lower() == b"vary" for name, _ in headers):
                    headers.append((b"vary", b"Origin"))
                if (caller := scope.get("dsv4_caller")) is not None:
                    headers += caller.meter.headers(
                        anthropic=scope["dsv4_error_body"] is anthropic.error_body
                    )
                message["headers"] = headers
            await send(message)

        return sending

    def _shape(self, scope: Scope) -> ErrorBody:
        """The shape of this request's errors: its endpoint's, or that of a client who says whose API it expects."""
        shape = self._shapes.get(scope["path"], error_body)
        return anthropic.error_body if header(scope, anthropic.VERSION_HEADER) else shape


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or static.is_open(scope)


def _too_many(most: int) -> RequestError:
    text = f"the server has all of its {most} connections in use; try again"
    return RequestError(text, None, "too_many_connections", 503, retry_after=1)


def _record_of(scope: Scope) -> Record:
    client, path = scope.get("client"), scope.get("raw_path") or scope["path"].encode()
    return Record(
        _request_id(header(scope, b"x-request-id")),
        scope["method"],
        path.decode("latin-1"),
        f"{client[0]}:{client[1]}" if client else "unix",
    )


def _request_id(given: str) -> str:
    """The client's id where it is harmless in logs and headers, else a new one."""
    if 0 < len(given) <= 128 and all(c.isalnum() or c in "-_.:" for c in given) and given.isascii():
        return given
    return new_request_id()


def _error(scope: Scope, error: RequestError, headers: dict[str, str] | None = None) -> Response:
    record: Record = scope["dsv4_record"]
    record.reason = error.code
    body = orjson.dumps(shaped(scope, error, record.request_id))
    again = {k.decode(): v.decode() for k, v in retry_headers(error)}
    return Response(body, error.status, again | (headers or {}), media_type="application/json")


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(request.scope, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    text = {
        404: f"there is nothing at {_short(request.url.path)}{_meant(request)}; GET / lists the endpoints",
        405: f"{_short(request.url.path)} does not take {request.method}; see the Allow header",
    }.get(status, HTTPStatus(status).phrase)
    absent = why_absent(request.url.path) if status == 404 else None
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "http_error")
    refused = RequestError(absent or text, None, "unsupported_endpoint" if absent else code, status)
    return _error(request.scope, refused, dict(error.headers or {}))


def _short(path: str) -> str:
    return path if len(path) <= 100 else path[:100] + "…"


def _meant(request: Request) -> str:
    """The path that was meant by one like it, as a base URL without /v1, with it twice, or with a slash too many makes them."""
    known = {r.path: r for r in request.app.routes if isinstance(r, Route) and "{" not in r.path}
    parts = [part for part in request.url.path[:200].split("/") if part]
    ends = ["/" + "/".join(parts[i:]) for i in range(len(parts))]
    found = next((path for end in ends for path in (end, "/v1" + end) if path in known), None)
    return f"; did you mean {found}?" if found else nearest("/" + "/".join(parts), known)


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this, and the server logs it."""
    record: Record = request.scope["dsv4_record"]
    return _error(request.scope, internal_error(record.request_id))
