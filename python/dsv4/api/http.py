"""The door of every POST endpoint: one request from its body to its answer, with limits, deadlines and
disconnects.

A handler gets a `Call` and answers through it. It runs in a task that is cancelled when the client goes away,
which closes its engine streams and so aborts its requests, in whatever state they are.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from starlette.types import Receive, Scope, Send

from dsv4._core import scan_json
from dsv4.api.errors import ErrorBody, error_body, internal_error, retry_headers, shaped
from dsv4.api.fields import Fields
from dsv4.api.grammar import asks_for_form
from dsv4.api.lanes import QUICK
from dsv4.errors import RequestError, kind, show

if TYPE_CHECKING:
    from dsv4.api.caller import Caller
    from dsv4.api.request_log import Record
    from dsv4.api.service import Service

log = logging.getLogger("dsv4.api")

MAX_DEPTH = 128
"""Levels of nesting in a body. Far beyond any real one, far below what recursion in encoders stands."""

MAX_VALUES = 2**19
"""Values and keys in a body, but for lists of token ids. A chat of 65,536 messages has fewer; to make objects of more holds
the interpreter's lock for too long."""

ID_LISTS = ("prompt", "tokens")
"""Where token ids stand. Lists of them become arrays without being objects."""

T = TypeVar("T")

JSON_TYPE = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete, or was cut off for another `reason`."""

    def __init__(self, reason: str = "client_gone") -> None:
        super().__init__(reason)
        self.reason = reason


class Call:
    """One request as handlers see it."""

    __slots__ = (
        "caller",
        "fields",
        "receive",
        "record",
        "request_id",
        "scope",
        "send",
        "service",
        "size",
        "started",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.service: Service = scope["app"].state.service
        self.record: Record = scope["dsv4_record"]
        self.caller: Caller = scope["dsv4_caller"]
        self.request_id = self.record.request_id
        self.fields, self.size = Fields({}), 0
        """The body, and its bytes."""
        self.started = False

    async def aside(self, work: Callable[[], T]) -> T:
        """`work()` on what the body holds, off the event loop where the body is long, or asks for a form that has to be looked at."""
        size = max(self.size, QUICK + 1) if asks_for_form(self.fields) else self.size
        return await self.service.lanes.run(work, size=size)

    async def respond(
        self, body: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        """Sends a whole JSON answer."""
        data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        length = (b"content-length", str(len(data)).encode())
        await self.start(status, (JSON_TYPE, length, *headers))
        await self.send({"type": "http.response.body", "body": data})

    async def start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        """Sends status and headers."""
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def refuse(self, error: RequestError) -> None:
        """Sends an error."""
        body = shaped(self.scope, error, self.request_id)
        await self.respond(body, error.status, retry_headers(error))


Handler = Callable[[Call], Awaitable[None]]


class PostEndpoint:
    """A handler as an ASGI app. Starlette's Request and Response objects stay out of the hot path."""

    def __init__(self, handler: Handler, *, generates: bool, errors: ErrorBody = error_body) -> None:
        """`generates`: refused while the server drains. `errors`: the shape of its errors."""
        self.handler, self.generates, self.errors = handler, generates, errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        await call.service.turnstile.wait()
        try:
            if self.generates:
                call.service.refuse_while_draining()
            with call.caller.meter.request():
                await self._read(call)
                await unless_gone(self.handler(call), receive)
        except ClientGone as e:
            call.record.reason = e.reason
            call.service.metrics.disconnects.inc()
        except RequestError as e:
            call.record.reason = e.code
            if e.status >= 500:
                log.warning("%s %s: %s", call.request_id, scope["path"], e.message)
            await call.refuse(e)
        except Exception:
            call.record.reason = "internal_error"
            log.exception("%s %s failed", call.request_id, scope["path"])
            if call.started:
                raise
            await call.refuse(internal_error(call.request_id))

    @staticmethod
    async def _read(call: Call) -> None:
        config = call.service.config
        body = await read_body(
            call.scope,
            call.receive,
            limit=min(config.max_body_bytes, call.caller.tenant.max_body_bytes or config.max_body_bytes),
            idle=config.body_timeout,
            rate=config.body_min_rate,
        )
        call.size = len(body)
        call.fields = Fields(await call.aside(lambda: parse_object(body)))


async def read_body(scope: Scope, receive: Receive, *, limit: int, idle: float, rate: int) -> bytes:
    """The whole body. RequestError 415 where it is packed, 413 beyond `limit` bytes, 408 after `idle` seconds without one, or when it takes `idle`
    seconds and another one for every `rate` bytes; ClientGone."""
    coding = header(scope, b"content-encoding").strip().lower()
    if coding not in ("", "identity"):
        text = f"content-encoding is {show(coding)}; a body is taken as it is: send it unpacked, without this header"
        raise RequestError(text, "content-encoding", "unsupported_encoding", 415)
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    parts, size = [], int(declared) if declared.isdigit() else 0
    if size > limit:
        raise _too_large(size, limit)
    size, more, begun = 0, True, time.monotonic()
    while more:
        left = begun + idle + size / max(rate, 1) - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), min(idle, max(left, 0.001)))
        except asyncio.TimeoutError:
            slow = (
                f"it comes at less than {rate} bytes a second"
                if left < idle
                else f"no byte came for {idle:g} s"
            )
            text = f"the body stopped after {size} bytes; {slow}"
            raise RequestError(text, None, "body_timeout", 408) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, more = message.get("body", b""), message.get("more_body", False)
        parts.append(part)
        size += len(part)
        if size > limit:
            raise _too_large(size, limit)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: int, limit: int) -> RequestError:
    return RequestError(
        f"the body has {size} bytes or more; the limit is {limit}", None, "body_too_large", 413
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object with bounded nesting and size; a byte order mark before it is passed over. Lists of 32-bit numbers under
    `ID_LISTS`, or lists of such, are int32 arrays. Raises RequestError."""
    values, depth, ids, rest = scan_json(body.removeprefix(codecs.BOM_UTF8), ID_LISTS)
    if values > MAX_VALUES:
        text = f"the body holds more than {MAX_VALUES} values and keys, not counting token ids"
        raise RequestError(text, None, "body_too_large", 413)
    try:
        value = orjson.loads(rest)
    except orjson.JSONDecodeError as e:
        raise RequestError(_no_json(body, e), None, "invalid_json", 400) from None
    if type(value) is not dict:
        raise RequestError(f"the body is {kind(value)}; it takes a JSON object", None, "invalid_json", 400)
    if depth > MAX_DEPTH:
        raise RequestError(f"the body nests deeper than {MAX_DEPTH} levels", None, "invalid_json", 400)
    return value | ids


def _no_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body.strip():
        return "the body is empty; it takes a JSON object"
    try:
        body.decode()
    except UnicodeDecodeError as e:
        looks = {b"\x1f\x8b": "gzip", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}.get(
            body[:2]
        )
        like = f"; it looks like {looks}" if looks else ""
        return f"the body is no UTF-8: byte 0x{body[e.start]:02x} at {e.start}{like}; it takes a JSON object in UTF-8"
    return f"the body is no valid JSON: {error}"


async def unless_gone(work: Any, receive: Receive) -> None:
    """Awaits `work`; when the client disconnects first, cancels it, waits for its clean-up and raises
    ClientGone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        for t in (task, watcher):
            if not t.done():
                t.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await t


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def header(scope: Scope, name: bytes) -> str:
    """A request header, or an empty string."""
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")
