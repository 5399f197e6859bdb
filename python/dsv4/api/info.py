"""Everything that does not generate: what is served, how it fares, and the tokenizer as a service."""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

import dsv4
from dsv4.api import static
from dsv4.api.caller import Caller
from dsv4.api.conversation import encode, read_conversation
from dsv4.api.errors import RETRY_AFTER
from dsv4.api.fields import Fields
from dsv4.api.http import Call
from dsv4.api.known_fields import CHAT, COMPLETIONS, check_known
from dsv4.api.metrics import CONTENT_TYPE
from dsv4.api.routing import routing_of
from dsv4.api.service import Service
from dsv4.errors import RequestError
from dsv4.text.chat import BOS, EOS
from dsv4.text.draft import Bound

MAX_TOKENS = 2**22
"""Most that `/tokenize` gives: more than any context holds."""


def json_response(body: Any, status: int = 200, **headers: str) -> Response:
    """A whole JSON answer."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def service_of(request: Request) -> Service:
    """The engine and what belongs to it."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.scope["dsv4_caller"]
    return caller


async def root(request: Request) -> Response:
    """The page for browsers; what this is, for programs."""
    if static.wants_page(request.scope):
        return static.send(request, "index.html")
    routes = [f"{' '.join(sorted(r.methods - {'HEAD'}))} {r.path}" for r in request.app.routes]
    service = service_of(request)
    return json_response(
        {"name": "dsv4", "version": dsv4.__version__, "model": service.name, "endpoints": routes},
        **{"vary": "Accept, Origin"},
    )


async def health(request: Request) -> Response:
    """200 while requests are taken and make progress, else 503 with the reason."""
    service = service_of(request)
    alive, why = service.engine.check_alive()
    if service.draining or service.ending:
        alive, why = False, service.going
    if alive:
        return json_response({"status": "ok"})
    return json_response({"status": why}, 503, **{"retry-after": RETRY_AFTER[503].decode()})


async def models(request: Request) -> Response:
    """Every served name, `default` among them; as a page of Anthropic's for its clients."""
    service = service_of(request)
    listed = [_model(request, name) for name in service.names]
    if _asks_anthropic(request):
        ends = {"has_more": False, "first_id": service.names[0], "last_id": service.names[-1]}
        return json_response({"data": listed, **ends})
    return json_response({"object": "list", "data": listed})


async def one_model(request: Request) -> Response:
    """One entry of the list, or 404 naming what is served."""
    service, name = service_of(request), request.path_params["name"]
    if not name:  # a slash behind the list's path
        return await models(request)
    service.check_model(Fields({"model": name}))
    return json_response(_model(request, name))


def _asks_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _model(request: Request, name: str) -> dict[str, Any]:
    service = service_of(request)
    if _asks_anthropic(request):
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.started))
        most = {"max_input_tokens": service.max_model_len, "max_tokens": service.max_model_len}
        return {"type": "model", "id": name, "display_name": name, "created_at": created, **most}
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "dsv4",
        "root": service.name,
        "max_model_len": service.max_model_len,
    }


async def version(request: Request) -> Response:
    return json_response({"version": dsv4.__version__})


async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


async def dump(request: Request) -> Response:
    """The core between two steps, as `dsv4 simulate --dump` reads it: 403 unless the server was started for it, since it
    holds what all clients sent."""
    service = service_of(request)
    if not (service.config.allow_dump or caller_of(request).admin):
        text = "this server gives no dumps, which hold the prompts of all clients; start it with --allow-dump"
        raise RequestError(text, None, "dump_not_allowed", 403)
    return await give_dump(request)


async def give_dump(request: Request) -> Response:
    """The same for who may have it."""
    return Response(await service_of(request).engine.dump(), media_type="application/json")


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's end and begin, as vLLM tells them: lm-eval's remote tokenizer reads them. There is no chat template."""
    tokenizer = service_of(request).tokenizer("tokenizer_info")
    known = {
        name: mark
        for name, mark in (("bos_token", BOS), ("eos_token", EOS))
        if tokenizer.find(mark) is not None
    }
    marks = {"bos_token": None, "eos_token": None, **known}
    body = {"tokenizer_class": "PreTrainedTokenizerFast", **marks, "pad_token": marks["eos_token"]}
    return json_response({**body, "chat_template": None})


async def tokenize(call: Call) -> None:
    """Text (`prompt`) or a chat (`messages`) as token ids."""
    fields, service = call.fields, call.service
    service.check_model(fields)
    routing = await call.aside(lambda: routing_of(call))
    await call.aside(lambda: check_known(fields, COMPLETIONS if fields.get("messages") is None else CHAT))
    if fields.get("messages") is not None:
        chat = await call.aside(lambda: read_conversation(fields))
        ids = (await encode(call, chat, tokenize_bound("messages"), routing)).prompt
    else:
        prompt = fields.text("prompt", longest=2**31)
        if prompt is None:
            raise RequestError(
                "prompt is missing; it takes text, or send messages", "prompt", "missing_field", 400
            )
        ids = await service.encode(prompt, tokenize_bound("prompt"), salt=routing.salt)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if fields.boolean("return_token_strs"):
        answer["token_strs"] = await call.aside(lambda: service.pieces(ids.tolist()))
    await call.respond(answer)


def tokenize_bound(param: str) -> Bound:
    """What a prompt that is only counted may have."""
    return Bound(MAX_TOKENS, param, "/tokenize takes at most")


async def detokenize(call: Call) -> None:
    """Token ids (`tokens`) as text, special tokens included."""
    fields, service = call.fields, call.service
    service.check_model(fields)
    tokenizer = service.tokenizer("tokens")

    def decode() -> str:
        tokens = fields.token_ids("tokens", service.vocab_size)
        return tokenizer.decode(tokens, skip_special=False)

    await call.respond({"prompt": await call.aside(decode)})
