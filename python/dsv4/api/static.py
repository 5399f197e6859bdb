"""The page at `/`: the files of `page/`, sent as they are. Nothing in them is secret, so they need no key; what they ask the
server for does."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from dsv4.api.http import header
from dsv4.errors import RequestError
from dsv4.spelling import nearest

PREFIX = "/page/"

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

HEADERS = {
    # Scripts and styles come from this server alone and never from a string; nothing may frame the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


def wants_page(scope: Scope) -> bool:
    """Whether it is a browser that asks for `/`; programs get JSON there."""
    return scope["path"] == "/" and "text/html" in header(scope, b"accept")


def is_open(scope: Scope) -> bool:
    """Whether this is a part of the page."""
    return scope["path"].startswith(PREFIX) or wants_page(scope)


async def part(request: Request) -> Response:
    """One file of the page."""
    return send(request, request.path_params["name"])


def send(request: Request, name: str) -> Response:
    """A file by its name; 304 where the browser has it. RequestError 404."""
    files = read_all()
    if name not in files:
        raise RequestError(f"the page has no {name[:100]}{nearest(name, files)}", None, "not_found", 404)
    body, tag = files[name]
    headers = HEADERS | {"etag": tag, "vary": "Accept, Origin"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, media_type=TYPES[name.rpartition(".")[2]])


@functools.cache
def read_all() -> dict[str, tuple[bytes, str]]:
    """By name, the bytes and the tag of every file."""
    folder = resources.files("dsv4") / "api" / "page"
    bodies = {
        file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in TYPES
    }
    return {name: (body, f'"{hashlib.sha256(body).hexdigest()[:16]}"') for name, body in bodies.items()}
