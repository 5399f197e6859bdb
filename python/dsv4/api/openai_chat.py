"""`POST /v1/chat/completions`: messages in; content, reasoning and tool calls out, whole or as they come.

The dialect is OpenAI's with DeepSeek's `reasoning_content`. A stream has the role first, then deltas, one
chunk with the `finish_reason` per choice, the usage with `choices: []` when asked for, and `[DONE]`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from dsv4.api.conversation import Conversation, encode, read_conversation, reasoning_of
from dsv4.api.errors import error_event
from dsv4.api.fields import Fields, refuse
from dsv4.api.generation import Job, UsageSum, jobs_for, run
from dsv4.api.http import Call
from dsv4.api.known_fields import CHAT, check_known
from dsv4.api.openai_usage import usage_body, usage_so_far
from dsv4.api.params import (
    answer_id_of,
    check_response_format,
    choices_of,
    include_usage_of,
    max_tokens_of,
    sampling_params,
)
from dsv4.api.routing import routing_of
from dsv4.api.service import Service
from dsv4.api.sse import EventStream
from dsv4.engine.request import RequestOutput
from dsv4.engine.sampler import Sampled
from dsv4.text.chat import END_THINK
from dsv4.text.output import Content, OutputParser, Piece, Reasoning, ToolArguments, ToolStart
from dsv4.text.tools import schemas_of, shown_tools

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


async def chat_completions(call: Call) -> None:
    """The handler."""
    fields, service = call.fields, call.service
    check_known(fields, CHAT)
    options = _options(fields, service)
    chat = await call.aside(lambda: read_conversation(fields))
    check_response_format(fields)
    # Markers must reach the parser, so special tokens are kept in the text whatever the request says.
    params = sampling_params(
        fields,
        max_tokens=max_tokens_of(fields, None),
        logprobs=options.logprobs,
        defaults=service.engine.sampling_defaults,
        skip_special_tokens=False,
    )
    if params.max_tokens == 0:
        raise refuse(
            "max_tokens",
            0,
            f"a whole number from 1 to {service.max_model_len}",
            "; the nearest valid value is 1",
        )
    routing = await call.aside(lambda: routing_of(call))
    prompt = await encode(call, chat, service.bound("messages"), salt=routing.salt)
    jobs = jobs_for([prompt], params, options.n, routing)
    answer = Answer(service, options, chat, f"chatcmpl-{answer_id_of(call)}", int(time.time()), prompt)
    if options.stream:
        await _stream(call, answer, jobs)
        return
    async for index, output in run(call, jobs):
        answer.choices[index].read(output)
        answer.usage.add(index, output)
    await call.respond(answer.whole())


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


class Choice:
    """One choice: parses what comes and, for an answer that is not streamed, keeps it."""

    def __init__(self, chat: Conversation, end_think: int) -> None:
        self.parser = OutputParser(
            thinking=chat.starts_in_thought,
            tools=chat.calls_tools,
            schemas=schemas_of(shown_tools(chat.messages, chat.tools)),
            continues=chat.ending == "continued",
        )
        self.begun = False
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[Sampled] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.reasoning_tokens = 0
        self._end_think = end_think if chat.starts_in_thought else None
        self._most_calls = None if chat.parallel_calls else 1

    def read(self, output: RequestOutput) -> list[Piece]:
        """What an output brings, in order."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self._count_reasoning(output.token_ids)
        pieces = self.parser.push(output.text) if output.text else []
        if output.finished:
            pieces += self.parser.finish(cut=output.finish_reason != "stop")
        if self._most_calls is not None:
            pieces = [p for p in pieces if getattr(p, "index", 0) < self._most_calls]
        for piece in pieces:
            self._keep(piece)
        if output.finished:
            called = output.finish_reason == "stop" and self.calls
            self.finish_reason = "tool_calls" if called else output.finish_reason
            self.stop_reason = output.stop_reason
        return pieces

    def _keep(self, piece: Piece) -> None:
        if isinstance(piece, Content):
            self.content.append(piece.text)
        elif isinstance(piece, Reasoning):
            self.reasoning.append(piece.text)
        elif isinstance(piece, ToolStart):
            function = {"name": piece.name, "arguments": ""}
            self.calls.append(
                {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            )
        else:
            self.calls[piece.index]["function"]["arguments"] += piece.text

    def _count_reasoning(self, tokens: Sequence[int]) -> None:
        """Tokens up to and with the one that closes the thinking part."""
        for token in tokens if self._end_think is not None else ():
            self.reasoning_tokens += 1
            if token == self._end_think:
                self._end_think = None
                return


class Answer:
    """Builds the JSON of an answer, whole or in chunks."""

    def __init__(
        self,
        service: Service,
        options: Options,
        chat: Conversation,
        id: str,
        created: int,
        prompt: np.ndarray,
    ) -> None:
        self.service, self.options, self.chat, self.prompt = service, options, chat, prompt
        self.usage = UsageSum(per_prompt=options.n)
        self._begun = False
        end_think = service.tokenizer("messages").special(END_THINK) if chat.thinking else -1
        self.choices = [Choice(chat, end_think) for _ in range(options.n)]
        self._head: dict[str, Any] = {"id": id, "created": created, "model": options.model}

    def whole(self) -> dict[str, Any]:
        """The answer of a request that was not streamed."""
        shown = []
        for index, choice in enumerate(self.choices):
            content = "".join(choice.content)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": content or (None if choice.calls else ""),
            }
            if choice.reasoning and self.options.reasoning:
                message["reasoning_content"] = "".join(choice.reasoning)
            if choice.calls:
                message["tool_calls"] = choice.calls
            body = {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs)}
            body |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            shown.append(body | ({"token_ids": choice.token_ids} if self.options.token_ids else {}))
        body = {**self._head, "object": "chat.completion", "choices": shown, "usage": self._usage()}
        return body | ({"prompt_token_ids": self.prompt.tolist()} if self.options.prompt_token_ids else {})

    def chunks(self, index: int, output: RequestOutput) -> bytes:
        """Frames for what one output brought; nothing when it only reports progress or text is held back."""
        choice = self.choices[index]
        pieces = choice.read(output)
        if not self.options.reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        deltas = [_delta(piece, choice) for piece in pieces]
        judged = self._logprobs(output.logprobs or []) if output.logprobs else None
        tokens = output.token_ids if self.options.token_ids else None
        if not deltas and (judged or tokens):  # text may be held back, probabilities never are
            deltas = [{}]
        if not choice.begun and (deltas or output.finished):
            choice.begun = True
            deltas = [{"role": "assistant", "content": ""}, *deltas]
        frames = [self._chunk(index, delta) for delta in deltas[:-1]]
        frames += [self._chunk(index, delta, judged, tokens) for delta in deltas[-1:]]
        if output.finished:
            frames.append(self._chunk(index, {}, finished=choice))
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
        finished: Choice | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if finished is not None:
            choice |= {"finish_reason": finished.finish_reason, "stop_reason": finished.stop_reason}
        if token_ids is not None:
            choice["token_ids"] = token_ids
        return self._frame([choice], None)

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        body: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self.options.include_usage:
            body["usage"] = usage
        if self.options.usage_so_far and choices:
            tokens = self.choices[choices[0]["index"]].token_ids
            body["usage"] = usage_so_far(len(self.prompt), len(tokens))
        if self.options.prompt_token_ids and not self._begun:
            body["prompt_token_ids"] = self.prompt.tolist()
        self._begun = True
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage_body(self.usage, sum(c.reasoning_tokens for c in self.choices))

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
        raw = self.service.tokenizer("messages").token_bytes(token)
        text = self.service.piece(token, as_id=self.options.tokens_as_ids)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _delta(piece: Piece, choice: Choice) -> dict[str, Any]:
    """A piece as the `delta` of a chunk; a call's id and name come first, then its arguments as fragments."""
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, ToolArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    call = {"index": piece.index, "id": choice.calls[piece.index]["id"], "type": "function"}
    return {"tool_calls": [call | {"function": {"name": piece.name, "arguments": ""}}]}


async def _stream(call: Call, answer: Answer, jobs: Sequence[Job]) -> None:
    async with EventStream(call, on_error=error_event) as stream:
        async for index, output in run(call, jobs):
            if output.prefilled is not None:
                stream.progress = f"prefill {output.prefilled}/{len(jobs[index].prompt)}"
            answer.usage.add(index, output)
            if frames := answer.chunks(index, output):
                await stream.send(frames)
        await stream.send(answer.end())
