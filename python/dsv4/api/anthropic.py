"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect, as Claude Code and Anthropic's SDKs speak it.

A stream has `message_start` with the counts of the prompt, then for each block its start, deltas and stop, then
`message_delta` with the `stop_reason` and all counts, and `message_stop`. What comes in is in `anthropic_input.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson

from dsv4.api.anthropic_input import read_messages, routing_for
from dsv4.api.conversation import Asked, Conversation, encode
from dsv4.api.dialect import EVENTS, OF_A_BODY, OF_A_GENERATION, Dialect, Operation, Post
from dsv4.api.generation import Job, run
from dsv4.api.grammar import held_to
from dsv4.api.http import Call
from dsv4.api.info import tokenize_bound
from dsv4.api.params import sampling_params
from dsv4.api.reply import News, Reply
from dsv4.api.sse import EventStream, Headers
from dsv4.api.strict_tools import StrictTools
from dsv4.api.thoughts import sealed
from dsv4.api.warnings import warning_headers
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.blocks import Block, Text, Thinking
from dsv4.text.blocks import Call as ToolCall
from dsv4.text.output import Content, Reasoning, ToolArguments

VERSION_HEADER = b"anthropic-version"
"""A client that sends it expects Anthropic's shapes wherever they differ. It may be absent, and any version is taken."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: RequestError, request_id: str = "") -> dict[str, Any]:
    """The JSON of an error in Anthropic's shape."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error.message
    if error.code == "context_length_exceeded":
        message = (
            f"prompt is too long: {message}"  # the words by which Claude Code knows that it has to compact
        )
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


@dataclass(frozen=True, slots=True)
class Options:
    """What shapes the answer, apart from sampling."""

    model: str
    stream: bool
    thoughts: bool
    """False: thinking blocks are empty, and their signature alone brings the thoughts back."""
    headers: Headers


async def messages(call: Call) -> None:
    """The handler of `/v1/messages`."""
    options, chat, strict, params, routing = await call.aside(lambda: _read(call))
    asked = await encode(call, chat, call.service.bound("messages"), routing)
    job = Job(0, asked.prompt, held_to(params, asked.grammar), routing, reading=asked.reading)
    answer = Answer(options, f"msg_{call.request_id}", asked, strict)
    if options.stream:
        await _stream(call, answer, job)
        return
    async for _, output in run(call, [job]):
        answer.reply.read(output)
    await call.respond(answer.whole(), headers=options.headers)


async def count_tokens(call: Call) -> None:
    """The handler of `/v1/messages/count_tokens`: what the same request to `/v1/messages` would read."""
    fields = call.fields
    call.service.check_model(fields)
    chat, _ = await call.aside(lambda: read_messages(fields))
    asked = await encode(call, chat, tokenize_bound("messages"), routing_for(call))
    await call.respond({"input_tokens": len(asked.prompt)})


def _read(call: Call) -> tuple[Options, Conversation, StrictTools, SamplingParams, Routing]:
    """Everything in the body, checked. Raises RequestError."""
    fields, service = call.fields, call.service
    chat, left_out = read_messages(fields)
    options = Options(
        model=service.check_model(fields),
        stream=fields.boolean("stream"),
        thoughts=fields.nested("thinking").text("display") != "omitted",
        headers=warning_headers(left_out),
    )
    params = sampling_params(
        fields,
        max_tokens=fields.integer("max_tokens", 1, 2**31 - 1),
        logprobs=None,
        defaults=service.engine.sampling_defaults,
        stops="stop_sequences",
    )
    return options, chat, StrictTools(chat.tools), params, routing_for(call)


class Answer:
    """Builds the JSON of an answer, whole or in events."""

    def __init__(self, options: Options, id: str, asked: Asked, strict: StrictTools) -> None:
        self.options, self.id, self.prompt_tokens = options, id, len(asked.prompt)
        self.reply = Reply(strict, call_prefix="toolu_", keep=asked.keep)
        self._begun = False
        self._open: tuple[int, Block] | None = None  # the block whose stop has not been sent

    def whole(self) -> dict[str, Any]:
        """The answer of a request that was not streamed."""
        ids = iter(self.reply.call_ids)
        content = [self._block(block, ids) for block in self.reply.blocks.all]
        return self._message(content) | self._end() | {"usage": self._usage()}

    def events(self, output: RequestOutput) -> bytes:
        """Frames for what one output brought."""
        news = self.reply.read(output)
        frames = []
        if not self._begun and (output.started or news or output.finished):
            self._begun = True
            message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
            frames.append(_event("message_start", message=message | {"usage": self._usage()}))
        for one in news:
            frames += self._news(one)
        if output.finished:
            frames += self._close()
            frames.append(_event("message_delta", delta=self._end(), usage=self._usage()))
            frames.append(_event("message_stop"))
        return b"".join(frames)

    def _news(self, news: News) -> list[bytes]:
        frames, piece, index = [], news.piece, news.number
        if news.begins:
            frames += self._close()
            self._open = (index, news.block)
            frames.append(_event("content_block_start", index=index, content_block=self._opening(news.block)))
        delta: dict[str, Any] | None = None
        if isinstance(piece, Content):
            delta = {"type": "text_delta", "text": piece.text}
        elif isinstance(piece, Reasoning) and self.options.thoughts:
            delta = {"type": "thinking_delta", "thinking": piece.text}
        elif isinstance(piece, ToolArguments):
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        return [*frames, _event("content_block_delta", index=index, delta=delta)] if delta else frames

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        (index, block), self._open, frames = self._open, None, []
        if isinstance(block, Thinking):
            delta = {"type": "signature_delta", "signature": sealed(block.text)}
            frames.append(_event("content_block_delta", index=index, delta=delta))
        return [*frames, _event("content_block_stop", index=index)]

    def _opening(self, block: Block) -> dict[str, Any]:
        if isinstance(block, ToolCall):
            return {"type": "tool_use", "id": self.reply.call_ids[-1], "name": block.name, "input": {}}
        if isinstance(block, Thinking):
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}

    def _block(self, block: Block, ids: Any) -> dict[str, Any]:
        if isinstance(block, Thinking):
            shown = block.text if self.options.thoughts else ""
            return {"type": "thinking", "thinking": shown, "signature": sealed(block.text)}
        if isinstance(block, Text):
            return {"type": "text", "text": block.text}
        return {"type": "tool_use", "id": next(ids), "name": block.name, "input": closed(block.arguments)}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.options.model}
        return {**head, "content": content}

    def _end(self) -> dict[str, Any]:
        """How and why the answer ended."""
        reply = self.reply
        stop = reply.stop_reason if isinstance(reply.stop_reason, str) else None
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(reply.finish_reason or "", "end_turn")
        end = {"stop_reason": "stop_sequence" if stop is not None else reason, "stop_sequence": stop}
        return end | ({"strict_error": reply.strict_error} if reply.strict_error else {})

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what was read from the cache apart from `input_tokens`."""
        started, usage = self.reply.started, self.reply.usage
        cached = usage.cached_tokens if usage else started.cached_tokens if started else 0
        return {
            "input_tokens": self.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens if usage else 0,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens if usage else 0},
        }


def closed(arguments: str) -> Any:
    """The arguments of a call as an object; what there is of them where `max_tokens` cut the call short."""
    for end in ("", "}", '"}', "null}", '": null}'):
        try:
            return json.loads(arguments + end)
        except ValueError:
            continue
    return {}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


async def _stream(call: Call, answer: Answer, job: Job) -> None:
    def on_error(error: RequestError) -> bytes:
        body = error_body(error, call.request_id)
        return b"event: error\ndata: %b\n\n" % orjson.dumps(body)

    async with EventStream(call, on_error=on_error, headers=answer.options.headers) as stream:
        async for _, output in run(call, [job]):
            if output.prefilled is not None:
                stream.progress = f"prefill {output.prefilled}/{len(job.prompt)}"
            if frames := answer.events(output):
                await stream.send(frames)


_HI = [{"role": "user", "content": "Hi"}]
DIALECT = Dialect(
    (
        Post(
            "/v1/messages",
            messages,
            Operation(
                "Anthropic's dialect",
                "MessagesAnswer",
                "MessagesRequest",
                OF_A_GENERATION,
                f"{EVENTS} of Anthropic's, to `message_stop`.",
                error="AnthropicError",
                example={"messages": _HI, "max_tokens": 4},
            ),
            generates=True,
        ),
        Post(
            "/v1/messages/count_tokens",
            count_tokens,
            Operation(
                "Counts what /v1/messages would read",
                "TokenCount",
                "CountTokensRequest",
                OF_A_BODY,
                error="AnthropicError",
                example={"messages": _HI},
            ),
        ),
    ),
    errors=error_body,
)
