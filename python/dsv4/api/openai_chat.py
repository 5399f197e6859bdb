"""`POST /v1/chat/completions`: messages in; content, reasoning and tool calls out, whole or as they come.

The dialect is OpenAI's with DeepSeek's `reasoning_content`. A stream has the role first, then deltas, one
chunk with the `finish_reason` per choice, the usage with `choices: []` when asked for, and `[DONE]`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from dsv4.api.conversation import Asked, Conversation, encode, read_conversation, reasoning_of
from dsv4.api.custom_tools import input_of
from dsv4.api.dialect import EVENTS, OF_A_GENERATION, Dialect, Operation, Post
from dsv4.api.errors import error_event
from dsv4.api.fields import Fields, refuse
from dsv4.api.generation import Job, UsageSum, jobs_for, run
from dsv4.api.grammar import held_to
from dsv4.api.http import Call
from dsv4.api.known_fields import CHAT, check_known
from dsv4.api.openai_usage import usage_body, usage_so_far
from dsv4.api.params import (
    answer_id_of,
    check_queue,
    choices_of,
    include_usage_of,
    max_tokens_of,
    sampling_params,
)
from dsv4.api.reply import Reply
from dsv4.api.routing import routing_of
from dsv4.api.service import Service
from dsv4.api.sse import EventStream, Headers
from dsv4.api.strict_tools import StrictTools
from dsv4.api.warnings import warning_headers
from dsv4.engine.request import RequestOutput, Sampled
from dsv4.engine.routing import Routing
from dsv4.quantities import nearest_number
from dsv4.sampling import SamplingParams
from dsv4.text.blocks import Call as ToolCall
from dsv4.text.output import Content, Piece, Reasoning, ToolArguments, ToolStart

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """What shapes the answer, apart from sampling."""

    model: str
    n: int
    logprobs: int | None
    """Alternatives per token; None without log-probabilities."""
    stream: bool
    include_usage: bool
    usage_so_far: bool
    """With `include_usage`: in every chunk."""
    token_ids: bool
    prompt_token_ids: bool
    tokens_as_ids: bool
    """Log-probabilities name tokens `token_id:N`."""
    reasoning: bool
    """The answer holds the thoughts."""
    customs: frozenset[str] = frozenset()
    """Tools that take text in place of JSON."""
    headers: Headers = ()


async def chat_completions(call: Call) -> None:
    """The handler."""
    options, chat, strict, params, routing = await call.aside(lambda: _read(call))
    asked = await encode(call, chat, call.service.bound("messages"), routing)
    params = held_to(params, asked.grammar)
    jobs = jobs_for([asked.prompt], params, options.n, routing, asked.reading)
    answer = Answer(call.service, options, f"chatcmpl-{answer_id_of(call)}", int(time.time()), asked, strict)
    if options.stream:
        await _stream(call, answer, jobs)
        return
    async for index, output in run(call, jobs):
        answer.replies[index].read(output)
        answer.usage.add(index, output)
    await call.respond(answer.whole(), headers=options.headers)


def _read(call: Call) -> tuple[Options, Conversation, StrictTools, SamplingParams, Routing]:
    """Everything in the body, checked. Raises RequestError."""
    fields, service = call.fields, call.service
    check_known(fields, CHAT)
    options = _options(fields, service)
    chat = read_conversation(fields)
    strict = StrictTools(chat.tools)
    params = sampling_params(
        fields,
        max_tokens=max_tokens_of(fields, None),
        logprobs=options.logprobs,
        defaults=service.engine.sampling_defaults,
    )
    if params.max_tokens == 0:
        takes = f"a whole number from 1 to {service.max_model_len}"
        raise refuse("max_tokens", 0, takes, nearest_number(0, 1, service.max_model_len))
    check_queue(1, options.n, service.engine.config.max_num_waiting)
    options = dataclasses.replace(
        options, customs=frozenset(chat.inputs), headers=warning_headers(chat.left_out)
    )
    return options, chat, strict, params, routing_of(call)


def _options(fields: Fields, service: Service) -> Options:
    model = service.check_model(fields)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    wanted = fields.boolean("logprobs")
    include_usage, usage_so_far = include_usage_of(fields)
    token_ids = fields.boolean("return_token_ids")
    if top and not wanted:
        raise refuse("top_logprobs", top, "0 unless logprobs is true")
    return Options(
        model=model,
        n=choices_of(fields),
        logprobs=(top or 0) if wanted else None,
        stream=fields.boolean("stream"),
        include_usage=include_usage,
        usage_so_far=usage_so_far,
        token_ids=token_ids,
        prompt_token_ids=fields.boolean("return_prompt_token_ids", token_ids),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        reasoning=reasoning_of(fields),
    )


class Answer:
    """Builds the JSON of an answer, whole or in chunks."""

    def __init__(
        self,
        service: Service,
        options: Options,
        id: str,
        created: int,
        asked: Asked,
        strict: StrictTools,
    ) -> None:
        self.service, self.options, self.prompt = service, options, asked.prompt
        self.usage = UsageSum(per_prompt=options.n)
        self._begun = False
        self._texts: dict[int, int] = {}  # by choice: its call of a custom tool whose text has not been sent
        self.replies = [Reply(strict, keep=asked.keep) for _ in range(options.n)]
        self._openings: dict[int, str | None] = {}  # the content that a choice's stream began with
        self._head: dict[str, Any] = {"id": id, "created": created, "model": options.model}

    def whole(self) -> dict[str, Any]:
        """The answer of a request that was not streamed."""
        shown = []
        for index, reply in enumerate(self.replies):
            body = {
                "index": index,
                "message": self._message(reply),
                "logprobs": self._logprobs(reply.logprobs),
                **_end(reply),
            }
            shown.append(body | ({"token_ids": reply.token_ids} if self.options.token_ids else {}))
        body = {**self._head, "object": "chat.completion", "choices": shown, "usage": self._usage()}
        return body | ({"prompt_token_ids": self.prompt.tolist()} if self.options.prompt_token_ids else {})

    def chunks(self, index: int, output: RequestOutput) -> bytes:
        """Frames for what one output brought; nothing when it only reports progress or text is held back."""
        reply = self.replies[index]
        pieces = [news.piece for news in reply.read(output)]
        if not self.options.reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        deltas = [delta for piece in pieces for delta in self._deltas(piece, index)]
        if output.finished and (text := self._text_ends(index)):
            deltas.append(text)
        judged = self._logprobs(output.logprobs or []) if output.logprobs else None
        tokens = output.token_ids if self.options.token_ids else None
        if not deltas and (judged or tokens):  # text may be held back, probabilities never are
            deltas = [{}]
        if index not in self._openings and (deltas or output.finished):
            # As in a whole answer, content is null where there are calls alone.
            self._openings[index] = None if pieces and not isinstance(pieces[0], Content) else ""
            deltas = [{"role": "assistant", "content": self._openings[index]}, *deltas]
        if output.finished and self._openings[index] is None and not (reply.call_ids or reply.blocks.content):
            deltas.append({"content": ""})
        frames = [self._chunk(index, delta) for delta in deltas[:-1]]
        frames += [self._chunk(index, delta, judged, tokens) for delta in deltas[-1:]]
        if output.finished:
            frames.append(self._chunk(index, {}, finished=reply))
        return b"".join(frames)

    def end(self) -> bytes:
        """The usage, when asked for, and the terminal event."""
        last = b"data: [DONE]\n\n"
        return self._frame([], self._usage()) + last if self.options.include_usage else last

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        token_ids: list[int] | None = None,
        finished: Reply | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if finished is not None:
            choice |= _end(finished)
        if token_ids is not None:
            choice["token_ids"] = token_ids
        return self._frame([choice], None)

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        body: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self.options.include_usage:
            body["usage"] = usage
        if self.options.usage_so_far and choices:
            tokens = self.replies[choices[0]["index"]].token_ids
            body["usage"] = usage_so_far(len(self.prompt), len(tokens))
        if self.options.prompt_token_ids and not self._begun:
            body["prompt_token_ids"] = self.prompt.tolist()
        self._begun = True
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage_body(self.usage, self.usage.reasoning_tokens)

    def _message(self, reply: Reply) -> dict[str, Any]:
        """A whole answer; content is null where there are calls alone."""
        blocks = reply.blocks
        content = blocks.content or (None if blocks.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if blocks.reasoning and self.options.reasoning:
            message["reasoning_content"] = blocks.reasoning
        if blocks.calls:
            message["tool_calls"] = [
                {"id": id, **self._call(call)} for id, call in zip(reply.call_ids, blocks.calls, strict=True)
            ]
        return message

    def _call(self, call: ToolCall) -> dict[str, Any]:
        if call.name in self.options.customs:
            return {"type": "custom", "custom": {"name": call.name, "input": input_of(call.arguments)}}
        return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _deltas(self, piece: Piece, index: int) -> Iterator[dict[str, Any]]:
        """A piece as `delta`s. A custom tool's text is inside of JSON until its end."""
        if isinstance(piece, ToolStart):
            if text := self._text_ends(index):
                yield text
            if piece.name in self.options.customs:
                self._texts[index] = piece.index
                call = {
                    "index": piece.index,
                    "id": self.replies[index].call_ids[piece.index],
                    "type": "custom",
                }
                yield {"tool_calls": [call | {"custom": {"name": piece.name, "input": ""}}]}
                return
        if not (isinstance(piece, ToolArguments) and piece.index == self._texts.get(index)):
            yield _delta(piece, self.replies[index])

    def _text_ends(self, index: int) -> dict[str, Any] | None:
        """The text of a custom tool whose call is over."""
        if (number := self._texts.pop(index, None)) is None:
            return None
        text = input_of(self.replies[index].blocks.calls[number].arguments)
        return {"tool_calls": [{"index": number, "custom": {"input": text}}]} if text else None

    def _logprobs(self, judged: Sequence[Sampled]) -> dict[str, Any] | None:
        top = self.options.logprobs
        if top is None:
            return None
        entry = self._entry
        content = [
            entry(s.token, s.logprob) | {"top_logprobs": [entry(t, p) for t, p in s.top[:top]]}
            for s in judged
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return judged_token(self.service, token, logprob, as_id=self.options.tokens_as_ids)


def judged_token(service: Service, token: int, logprob: float, *, as_id: bool = False) -> dict[str, Any]:
    """A token and its log-probability as OpenAI's dialects show them."""
    raw = service.tokenizer("messages").token_bytes(token)
    return {"token": service.piece(token, as_id=as_id), "logprob": logprob, "bytes": list(raw)}


def _end(reply: Reply) -> dict[str, Any]:
    """How and why a choice ended."""
    end = {"finish_reason": reply.finish_reason, "stop_reason": reply.stop_reason}
    return end | ({"strict_error": reply.strict_error} if reply.strict_error else {})


def _delta(piece: Piece, reply: Reply) -> dict[str, Any]:
    """A piece as the `delta` of a chunk; a call's id and name come first, then its arguments as fragments."""
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, ToolArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    call = {"index": piece.index, "id": reply.call_ids[piece.index], "type": "function"}
    return {"tool_calls": [call | {"function": {"name": piece.name, "arguments": ""}}]}


async def _stream(call: Call, answer: Answer, jobs: Sequence[Job]) -> None:
    async with EventStream(call, on_error=error_event, headers=answer.options.headers) as stream:
        async for index, output in run(call, jobs):
            if output.prefilled is not None:
                stream.progress = f"prefill {output.prefilled}/{len(jobs[index].prompt)}"
            answer.usage.add(index, output)
            if frames := answer.chunks(index, output):
                await stream.send(frames)
        await stream.send(answer.end())


def _post(path: str, summary: str) -> Post:
    told = Operation(
        summary,
        "ChatAnswer",
        "ChatRequest",
        OF_A_GENERATION,
        f"{EVENTS}: chunks as `data:`, then `[DONE]`.",
        example={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    )
    return Post(path, chat_completions, told, generates=True)


DIALECT = Dialect(
    (
        _post("/v1/chat/completions", "A chat's next message"),
        _post("/beta/chat/completions", "/v1/chat/completions by DeepSeek's name"),
    )
)
