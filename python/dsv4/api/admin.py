"""`/admin`: what only an operator may see and do. The edge lets nobody in without an admin's key."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dsv4.api import info
from dsv4.api.http import Call
from dsv4.api.info import json_response, service_of
from dsv4.api.request_log import new_request_id
from dsv4.errors import Dsv4Error, RequestError

PREFIX = "/admin"

ALIASES = frozenset({"/flush_cache", "/reset_prefix_cache"})
"""Other servers' names of routes under `PREFIX`: SGLang's and vLLM's."""

MOST_STEPS = 1000
"""Steps of one profile: a trace has about a megabyte for each on a GPU."""

LOOK_EVERY = 0.1
"""Seconds between two looks at a profile."""


def is_admin(path: str) -> bool:
    """Whether a path is an operator's."""
    return path == PREFIX or path.startswith(PREFIX + "/") or path in ALIASES


async def cache(request: Request) -> Response:
    """The core's statistics, pinned prefixes and, by tenant, what was served."""
    service = service_of(request)
    service.pins = {n: tenant for n, tenant in service.pins.items() if service.engine.may_hold(n)}
    return json_response(
        {
            "stats": service.engine.stats(),
            "tenants": service.engine.tenants(),
            "pins": [{"id": f"pin-{n}", "tenant": tenant} for n, tenant in service.pins.items()],
        }
    )


async def flush(request: Request) -> Response:
    """Forgets every prefix that no request uses and nothing pins."""
    freed = await service_of(request).engine.ask("clear_prefix")
    return json_response({"object": "cache", "flushed": True, "freed_pages": freed})


async def tenants(request: Request) -> Response:
    """Of each tenant in the file of keys: its limits, what runs, what is left of a minute, what was refused."""
    meters = service_of(request).callers.meters
    return json_response({name: meter.shown() for name, meter in meters.items()})


async def drain(request: Request) -> Response:
    """Takes no new requests; running ones go on. What SIGTERM does first, but the server stays and can `resume`."""
    service = service_of(request)
    service.draining = True
    return json_response(_draining(service))


async def resume(request: Request) -> Response:
    """Takes requests again after `drain`. RequestError 409 when the server is ending."""
    service = service_of(request)
    if service.ending:
        raise RequestError("the server is ending and takes no requests any more", None, "draining", 409)
    service.draining = False
    return json_response(_draining(service))


def _draining(service: Any) -> dict[str, Any]:
    stats = service.engine.stats()
    return {"draining": service.draining, **{k: stats.get(k, 0) for k in ("running", "waiting", "parked")}}


async def explain(request: Request) -> Response:
    """What a request that runs, or one of the last that ended, reused of the cache and why not more; 404 where there is none of that id."""
    service, name = service_of(request), request.path_params["id"]
    if not name:
        text = "the path ends without the request's id; write GET /admin/requests/ID"
        raise RequestError(text, "id", "missing_field", 400)
    live = await service.engine.explain(name)
    if not live and (ended := service.recent.find(name)) is not None:
        return json_response({"id": name, "object": "explanation", "generations": [], "ended": ended})
    if not live:
        text = f"no request {name[:128]!r} runs or is kept; ids are in the log and in the header x-request-id"
        raise RequestError(text, "id", "request_not_found", 404)
    return json_response({"id": name, "object": "explanation", "generations": live, "ended": None})


async def profile(call: Call) -> None:
    """Traces the next `steps` steps by torch's profiler, or those of the next `seconds`, into a file of `--profile-dir`, and says
    which."""
    service, fields = call.service, call.fields
    folder = service.config.profile_dir
    if folder is None:
        text = "this server writes no profiles; start it with --profile-dir DIR"
        raise RequestError(text, None, "profile_not_allowed", 403)
    steps = fields.integer("steps", 1, MOST_STEPS, 20) or 20
    seconds = fields.number("seconds", 0.1, 600) or 60.0
    # Not by the request's id: clients may send the same one twice, and a profile is known by its file.
    name = f"dsv4-{time.strftime('%Y%m%d-%H%M%S')}-{new_request_id()[:8]}.json.gz"
    path = os.path.join(os.path.abspath(folder), name)
    done = await _trace(call, path, steps, seconds)
    await call.respond({"object": "profile", "file": path, "steps": done})


async def _trace(call: Call, path: str, steps: int, seconds: float) -> int:
    engine = call.service.engine
    try:
        try:
            await engine.ask("profile_begin", path, steps)
            end = time.monotonic() + seconds
            while time.monotonic() < end and not await engine.ask("profile_state", path):
                await asyncio.sleep(LOOK_EVERY)
        finally:  # also of one whose client went away before it had begun: the engine takes both in this order
            done: int = await asyncio.shield(engine.ask("profile_end", path))
        return done
    except RequestError:
        raise
    except Dsv4Error as e:
        raise RequestError(f"no profile: {e}", None, "profile_failed", 409) from None


dump = info.give_dump
"""The core between two steps, for `dsv4 simulate --dump`."""
