"""`POST /v1/responses`: OpenAI's Responses API without its store, as Codex and OpenAI's SDKs speak it.

An answer is a list of items: reasoning, messages, calls. A stream has `response.created` and `response.in_progress`, then
for each item its beginning, deltas, texts and the whole item again, then `response.completed` with the whole answer (or
`response.incomplete` where `max_output_tokens` cut it). What comes in is in `responses_input.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import orjson

from dsv4.api.conversation import Conversation, encode
from dsv4.api.custom_tools import input_of
from dsv4.api.dialect import EVENTS, OF_A_BODY, OF_A_GENERATION, Dialect, Operation, Post
from dsv4.api.generation import Job, run
from dsv4.api.grammar import held_to
from dsv4.api.http import Call, header
from dsv4.api.info import tokenize_bound
from dsv4.api.known_fields import RESPONSES, check_known
from dsv4.api.openai_chat import MAX_TOP_LOGPROBS, judged_token
from dsv4.api.params import sampling_params
from dsv4.api.reply import News, Reply
from dsv4.api.responses_input import ENCRYPTED, ResponsesTools, ToolName, read_input
from dsv4.api.routing import routing_of
from dsv4.api.service import Service
from dsv4.api.sse import EventStream, Headers
from dsv4.api.strict_tools import StrictTools
from dsv4.api.thoughts import sealed
from dsv4.api.warnings import warning_headers
from dsv4.engine.request import RequestOutput, Sampled
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.blocks import Block, Text, Thinking
from dsv4.text.blocks import Call as ToolCall

ORIGINATOR_HEADER = b"originator"
"""Codex names itself in it."""

_LOGPROBS = "message.output_text.logprobs"

_ECHOED: tuple[str, ...] = ("instructions", "metadata", "parallel_tool_calls", "reasoning", "temperature")
_ECHOED += ("tool_choice", "tools", "top_p", "max_output_tokens", "text", "prompt_cache_key", "user")
_ECHO_DEFAULTS: dict[str, Any] = {
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "text": {"format": {"type": "text"}},
}


@dataclass(frozen=True, slots=True)
class Options:
    """What shapes the answer, apart from sampling."""

    model: str
    stream: bool
    encrypted: bool
    """Thoughts come in `encrypted_content` too, for clients that keep that alone."""
    logprobs: int | None
    """Alternatives per token of the text; None without log-probabilities."""
    echo: dict[str, Any]
    """What an answer repeats of its request."""
    headers: Headers


async def responses(call: Call) -> None:
    """The handler."""
    options, chat, tools, params, routing = await call.aside(lambda: _read(call))
    strict = await call.aside(lambda: StrictTools(chat.tools))
    answer = Answer(call.service, options, f"resp_{call.request_id}", tools, strict)
    try:
        job = await _job(call, chat, params, routing, answer.reply)
    except RequestError as e:
        if not (options.stream and _compacts(call, e)):
            raise
        call.record.reason = e.code
        async with EventStream(call, on_error=answer.failed) as stream:
            await stream.send(answer.begin() + answer.failed(e))
        return
    if options.stream:
        await _stream(call, answer, job)
        return
    async for _, output in run(call, [job]):
        answer.read(output)
    await call.respond(answer.whole(), headers=options.headers)


def _compacts(call: Call, error: RequestError) -> bool:
    """Codex makes its conversation shorter when a stream says that it does not fit, not at a status of 400."""
    codex = header(call.scope, ORIGINATOR_HEADER).startswith("codex")
    return codex and error.code == "context_length_exceeded"


async def input_tokens(call: Call) -> None:
    """The handler of `/v1/responses/input_tokens`: what the same request to `/v1/responses` would read."""
    fields = call.fields
    call.service.check_model(fields)
    await call.aside(lambda: check_known(fields, RESPONSES))
    chat, _ = await call.aside(lambda: read_input(fields))
    asked = await encode(call, chat, tokenize_bound("input"), routing_of(call))
    await call.respond({"object": "response.input_tokens", "input_tokens": len(asked.prompt)})


async def _job(call: Call, chat: Conversation, params: SamplingParams, routing: Routing, reply: Reply) -> Job:
    asked = await encode(call, chat, call.service.bound("input"), routing)
    reply.keep = asked.keep
    params = held_to(params, asked.grammar)
    return Job(0, asked.prompt, params, routing, reading=asked.reading)


def _read(call: Call) -> tuple[Options, Conversation, ResponsesTools, SamplingParams, Routing]:
    """Everything in the body, checked. Raises RequestError."""
    fields, service = call.fields, call.service
    check_known(fields, RESPONSES)
    wanted, top = fields.items("include", str, 64), fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    logprobs = (top or 0) if top or _LOGPROBS in wanted else None
    model = service.check_model(fields)
    chat, tools = read_input(fields)
    if fields.nested("text").get("verbosity") not in (None, "medium"):
        tools.left_out.append("text.verbosity is unknown to V4")
    options = Options(
        model=model,
        stream=fields.boolean("stream"),
        encrypted=ENCRYPTED in wanted,
        logprobs=logprobs,
        echo={k: fields.get(k) if fields.get(k) is not None else _ECHO_DEFAULTS.get(k) for k in _ECHOED},
        headers=warning_headers(tools.left_out),
    )
    params = sampling_params(
        fields,
        max_tokens=fields.integer("max_output_tokens", 1, 2**31 - 1),
        logprobs=logprobs,
        defaults=service.engine.sampling_defaults,
    )
    return options, chat, tools, params, routing_of(call)


class Answer:
    """Builds the JSON of an answer, whole or in events."""

    def __init__(
        self, service: Service, options: Options, id: str, tools: ResponsesTools, strict: StrictTools
    ) -> None:
        self.service, self.options, self.id, self.tools = service, options, id, tools
        self.reply = Reply(strict)
        self._created = int(time.time())
        self._begun = False
        self._sequence = 0
        self._open: int | None = None  # the item whose end has not been sent
        self._judged: dict[int, list[dict[str, Any]]] = {}  # by item: its tokens' log-probabilities
        self._unplaced: list[Sampled] = []  # of tokens whose text is held back

    def read(self, output: RequestOutput) -> list[News]:
        """What an output brings, in order. Only the tokens of texts are judged."""
        news = self.reply.read(output)
        if output.logprobs:  # special tokens are never text
            special = self.service.tokenizer("input").control
            self._unplaced += [judged for judged in output.logprobs if judged.token not in special]
        if (text := _last_text(news)) is not None:
            self._judged.setdefault(text.number, []).extend(map(self._entry, self._unplaced))
        self._unplaced = [] if news else self._unplaced
        return news

    def _entry(self, judged: Sampled) -> dict[str, Any]:
        top = judged.top[: self.options.logprobs or 0]
        return judged_token(self.service, judged.token, judged.logprob) | {
            "top_logprobs": [judged_token(self.service, *one) for one in top]
        }

    def whole(self) -> dict[str, Any]:
        """The answer as it is at its end."""
        cut = self.reply.finish_reason == "length"
        body = self._body("incomplete" if cut else "completed", self._items())
        body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        body["usage"] = self._usage()
        return body | ({"strict_error": self.reply.strict_error} if self.reply.strict_error else {})

    def begin(self) -> bytes:
        """The frames before all others."""
        self._begun = True
        started = self._body("in_progress", [])
        return self._event("response.created", response=started) + self._event(
            "response.in_progress", response=started
        )

    def events(self, output: RequestOutput) -> bytes:
        """Frames for what one output brought."""
        told = {index: len(judged) for index, judged in self._judged.items()}
        news = self.read(output)
        frames = []
        if not self._begun and (output.started or news or output.finished):
            frames.append(self.begin())
        last = _last_text(news)
        for one in news:
            judged = self._judged.get(one.number, [])[told.get(one.number, 0) :] if one is last else []
            frames.append(self._news(one, judged))
        if output.finished:
            frames.append(self._close())
            whole = self.whole()
            frames.append(self._event(f"response.{whole['status']}", response=whole))
        return b"".join(frames)

    def failed(self, error: RequestError) -> bytes:
        """The last frame of a stream that failed."""
        own = "invalid_prompt" if error.status == 400 else "server_error"
        code = error.code if error.code in ("context_length_exceeded", "rate_limit_exceeded") else own
        body = self._body("failed", self._items())
        body["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=body)

    def _news(self, news: News, judged: list[dict[str, Any]]) -> bytes:
        frames, block, index = b"", news.block, news.number
        if news.begins:
            frames += self._close()
            self._open = index
            item = self._item(index, "in_progress", empty=True)
            frames += self._event("response.output_item.added", output_index=index, item=item)
            if part := self._part(index, ""):
                frames += self._of(index, "response.content_part.added", content_index=0, part=part)
        text = getattr(news.piece, "text", "")
        if not text or self._custom(block):  # a custom tool's text is inside of JSON until its end
            return frames
        return frames + self._of(index, f"{_KINDS[type(block)]}.delta", **_content(block, judged), delta=text)

    def _close(self) -> bytes:
        """The end of the item at hand."""
        if self._open is None:
            return b""
        index, self._open = self._open, None
        block, item, frames = self.reply.blocks.all[index], self._item(index), b""
        if self._custom(block):
            if item["input"]:
                frames += self._of(index, "response.custom_tool_call_input.delta", delta=item["input"])
            frames += self._of(index, "response.custom_tool_call_input.done", input=item["input"])
        elif isinstance(block, ToolCall):
            done = {"name": item["name"], "arguments": block.arguments}
            frames += self._of(index, "response.function_call_arguments.done", **done)
        else:
            about = _content(block, self._judged.get(index, []))
            frames += self._of(index, f"{_KINDS[type(block)]}.done", **about, text=block.text)
            part = self._part(index, block.text)
            frames += self._of(index, "response.content_part.done", content_index=0, part=part)
        return frames + self._event("response.output_item.done", output_index=index, item=item)

    def _of(self, index: int, kind: str, **fields: Any) -> bytes:
        """An event about an item."""
        return self._event(kind, item_id=self._item_id(index), output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _items(self) -> list[dict[str, Any]]:
        return [self._item(i) for i in range(len(self.reply.blocks.all))]

    def _item(self, index: int, status: str | None = None, *, empty: bool = False) -> dict[str, Any]:
        """An item as it is; `empty`: as it is announced."""
        blocks = self.reply.blocks.all
        block, last = blocks[index], index == len(blocks) - 1
        status = status or ("incomplete" if last and self.reply.finish_reason == "length" else "completed")
        item: dict[str, Any] = {"id": self._item_id(index), "status": status}
        if isinstance(block, ToolCall):
            return item | self._call(index, block, empty)
        parts = [] if empty else [self._part(index, block.text)]
        if isinstance(block, Thinking):
            hidden = sealed(block.text) if self.options.encrypted and not empty else None
            return item | {"type": "reasoning", "summary": [], "content": parts, "encrypted_content": hidden}
        return item | {"type": "message", "role": "assistant", "content": parts}

    def _part(self, index: int, text: str) -> dict[str, Any] | None:
        block = self.reply.blocks.all[index]
        if isinstance(block, ToolCall):
            return None
        if isinstance(block, Thinking):
            return {"type": "reasoning_text", "text": text}
        judged = self._judged.get(index, []) if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": judged}

    def _call(self, index: int, call: ToolCall, empty: bool) -> dict[str, Any]:
        number = sum(isinstance(b, ToolCall) for b in self.reply.blocks.all[:index])
        known = self.tools.names.get(call.name) or ToolName(call.name)
        item: dict[str, Any] = {"call_id": self.reply.call_ids[number], "name": known.name}
        if known.namespace is not None:
            item["namespace"] = known.namespace
        if known.custom:
            return item | {"type": "custom_tool_call", "input": "" if empty else input_of(call.arguments)}
        return item | {"type": "function_call", "arguments": "" if empty else call.arguments}

    def _custom(self, block: Block) -> bool:
        known = self.tools.names.get(block.name) if isinstance(block, ToolCall) else None
        return known is not None and known.custom

    def _item_id(self, index: int) -> str:
        block = self.reply.blocks.all[index]
        kind = "msg" if type(block) is Text else "rs" if isinstance(block, Thinking) else "fc"
        kind = "ctc" if self._custom(block) else kind
        return f"{kind}_{self.id.removeprefix('resp_')}_{index}"

    def _body(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.options.model,
            "output": output,
            "previous_response_id": None,
            "store": False,
            "background": False,
            "truncation": "disabled",
            "usage": None,
            **self.options.echo,
        }

    def _usage(self) -> dict[str, Any] | None:
        usage = self.reply.usage
        if usage is None:
            return None
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


_KINDS: dict[type[Block], str] = {
    Text: "response.output_text",
    Thinking: "response.reasoning_text",
    ToolCall: "response.function_call_arguments",
}


def _last_text(news: list[News]) -> News | None:
    """The last piece of text, which the log-probabilities of an output go to."""
    return next((one for one in reversed(news) if type(one.block) is Text), None)


def _content(block: Block, judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Which part of an item an event is about, where items have parts."""
    if isinstance(block, ToolCall):
        return {}
    return {"content_index": 0} | ({"logprobs": judged} if type(block) is Text else {})


async def _stream(call: Call, answer: Answer, job: Job) -> None:
    async with EventStream(call, on_error=answer.failed, headers=answer.options.headers) as stream:
        async for _, output in run(call, [job]):
            if output.prefilled is not None:
                stream.progress = f"prefill {output.prefilled}/{len(job.prompt)}"
            if frames := answer.events(output):
                await stream.send(frames)


DIALECT = Dialect(
    (
        Post(
            "/v1/responses",
            responses,
            Operation(
                "OpenAI's Responses API without its store",
                "ResponsesAnswer",
                "ResponsesRequest",
                OF_A_GENERATION,
                f"{EVENTS} of the Responses API, to `response.completed`.",
                example={"input": "Hi", "max_output_tokens": 4},
            ),
            generates=True,
        ),
        Post(
            "/v1/responses/input_tokens",
            input_tokens,
            Operation(
                "Counts what /v1/responses would read",
                "InputTokens",
                "ResponsesCountRequest",
                OF_A_BODY,
                example={"input": "Hi"},
            ),
        ),
    )
)
