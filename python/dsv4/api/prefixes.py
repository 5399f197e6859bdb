"""Prefixes that stay in the cache because someone said so, and sessions that are over."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from dsv4.api.caller import Caller
from dsv4.api.conversation import encode, read_conversation
from dsv4.api.fields import Fields, refuse
from dsv4.api.generation import jobs_for, run
from dsv4.api.http import Call
from dsv4.api.info import caller_of, json_response, service_of
from dsv4.api.known_fields import CHAT, COMPLETIONS, check_known
from dsv4.api.params import sampling_params
from dsv4.api.routing import routing_of
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError


async def pin(call: Call) -> None:
    """Computes a `prompt` (text or token ids) or the prompt of a chat (`messages`), unless it is cached, and keeps its whole
    blocks and the states on them until they are unpinned. Answers with the pin's id and what of the prompt was cached
    before."""
    fields, service = call.fields, call.service
    check_may_pin(call.caller)
    service.check_model(fields)
    await call.aside(lambda: check_known(fields, COMPLETIONS if fields.get("messages") is None else CHAT))
    routing = await call.aside(lambda: routing_of(call))
    prompt = await _prompt(call, routing)
    params = sampling_params(Fields({}), max_tokens=0, logprobs=None)
    cached = 0
    async with contextlib.aclosing(run(call, jobs_for([prompt], params, 1, routing))) as outputs:
        async for _, output in outputs:
            cached = output.usage.cached_tokens if output.usage else cached
    number = await _keep(call, prompt, routing.salt)
    service.pins[number] = call.caller.tenant.name
    await call.respond(
        {"id": f"pin-{number}", "object": "prefix", "prompt_tokens": len(prompt), "cached_tokens": cached}
    )


async def _keep(call: Call, prompt: np.ndarray, salt: str) -> int:
    """The number of a new pin. Ends it at once where the client has gone meanwhile: nobody would know its id."""
    engine, gone = call.service.engine, False

    async def keep() -> int:
        number = await engine.pin(prompt, salt)
        if gone:
            await engine.unpin(number)
        return number

    try:
        return await asyncio.shield(keep())
    except asyncio.CancelledError:
        gone = True
        raise


def check_may_pin(caller: Caller) -> None:
    """RequestError 403 for a tenant that may keep nothing: what is kept takes room from all."""
    if not caller.pin:
        text = (
            f"tenant {caller.tenant.name!r} may keep no prefixes; `pin = true` in the file of keys allows it"
        )
        raise RequestError(text, None, "pin_not_allowed", 403)


async def _prompt(call: Call, routing: Routing) -> np.ndarray:
    fields, service = call.fields, call.service
    if fields.get("messages") is not None:
        chat = await call.aside(lambda: read_conversation(fields))
        return (await encode(call, chat, service.bound("messages"), routing)).prompt
    if type(fields.get("prompt")) is not str and fields.get("prompt") is not None:
        ids = await call.aside(lambda: fields.token_ids("prompt", service.vocab_size))
        if len(ids):
            return ids
        raise refuse("prompt", fields.get("prompt"), "at least one token id")
    text = fields.text("prompt", longest=2**31)
    if not text:
        raise RequestError("prompt or messages is missing", "prompt", "missing_field", 400)
    return await service.encode(text, service.bound("prompt"), salt=routing.salt)


async def unpin(request: Request) -> Response:
    """Ends a pin; 404 when this caller has none of that id."""
    name, service, caller = request.path_params["id"], service_of(request), caller_of(request)
    check_may_pin(caller)
    text = name.removeprefix("pin-")
    number = int(text) if text.isdecimal() and len(text) < 19 else -1
    own = caller.admin or service.pins.get(number, "") == caller.tenant.name
    if own:  # also where the engine's process that had it is gone
        service.pins.pop(number, None)
    known = number >= 0 and own and await service.engine.unpin(number)
    if not known:
        raise RequestError(
            f"there is no pin {name!r}; POST /v1/prefixes makes one", "id", "pin_not_found", 404
        )
    return json_response({"id": name, "object": "prefix", "deleted": True})


async def end_session(request: Request) -> Response:
    """A session (`prompt_cache_key`) is over: what only it used is the first to go. `cached` says whether anything of it
    was there."""
    if not (key := request.path_params["key"]):
        text = (
            "the path ends without the session's key; write DELETE /v1/sessions/KEY with its prompt_cache_key"
        )
        raise RequestError(text, "key", "missing_field", 400)
    cached = await service_of(request).engine.end_session(caller_of(request).tenant.session(key))
    return json_response({"id": key, "object": "session", "deleted": True, "cached": cached})
