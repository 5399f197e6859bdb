"""`POST /v1/completions`: text or token ids in, text and token ids out.

With a `suffix` the answer is what goes between the two. Also what evaluation harnesses need: many prompts in one request, and `echo` with `logprobs` for the prompt's
tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from dsv4.api.dialect import EVENTS, OF_A_GENERATION, Dialect, Operation, Post
from dsv4.api.errors import error_event
from dsv4.api.fields import Fields, refuse, token_ids
from dsv4.api.generation import UsageSum, jobs_for, run
from dsv4.api.grammar import held_to, openai_format
from dsv4.api.http import Call
from dsv4.api.known_fields import COMPLETIONS, check_known
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
from dsv4.api.sse import EventStream
from dsv4.engine.request import RequestOutput, Sampled
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError
from dsv4.sampling import Grammar, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""As OpenAI and vLLM have it for this endpoint."""

MAX_PROMPTS = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """What shapes the answer, apart from sampling."""

    model: str
    n: int
    echo: bool
    nothing: bool
    """max_tokens is 0: one token is generated and not shown, so that the prompt can be judged."""
    logprobs: int | None
    token_ids: bool
    tokens_as_ids: bool
    """Log-probabilities name tokens `token_id:N`."""
    stream: bool
    include_usage: bool
    usage_so_far: bool
    """With `include_usage`: in every chunk."""
    suffix: str
    """The text after the answer, where one is to be filled in."""


async def completions(call: Call) -> None:
    """The handler."""
    service = call.service
    options, given, params, routing = await call.aside(lambda: _read(call))
    prompts = [await _prompt_ids(call, *one, routing.salt, options.suffix) for one in given.items()]
    jobs = jobs_for(prompts, params, options.n, routing)
    answer = Answer(service, options, f"cmpl-{answer_id_of(call)}", int(time.time()), prompts)
    if options.stream:
        await _stream(call, answer, jobs)
        return
    replies = [Reply() for _ in jobs]
    async for index, output in run(call, jobs):
        replies[index].read(output)
        answer.usage.add(index, output)
    await call.respond(await call.aside(lambda: answer.whole(replies)))


def _read(call: Call) -> tuple[Options, dict[str, Any], SamplingParams, Routing]:
    """Everything in the body, checked but for what is in the prompts. Raises RequestError."""
    fields, service = call.fields, call.service
    check_known(fields, COMPLETIONS)
    options, prompts = _options(fields, service), _prompts(fields)
    wanted = max_tokens_of(fields, DEFAULT_MAX_TOKENS)
    params = sampling_params(
        fields,
        max_tokens=1 if options.nothing else wanted,
        logprobs=options.logprobs,
        prompt_logprobs=options.logprobs if options.echo else None,
        defaults=service.engine.sampling_defaults,
    )
    if (format := openai_format(fields)) is not None:
        service.tokenizer(format.field)
        params = held_to(params, Grammar(format.text(), format.field))
    check_queue(len(prompts), options.n, service.engine.config.max_num_waiting)
    return options, prompts, params, routing_of(call)


def _options(fields: Fields, service: Service) -> Options:
    model = service.check_model(fields)
    include_usage, usage_so_far = include_usage_of(fields)
    logprobs = fields.get("logprobs")
    # `true` is the chat endpoint's spelling; clients mix them up, and its meaning is plain.
    logprobs = int(logprobs) if isinstance(logprobs, bool) and logprobs else logprobs
    options = Options(
        model=model,
        n=choices_of(fields),
        echo=fields.boolean("echo"),
        nothing=max_tokens_of(fields, DEFAULT_MAX_TOKENS) == 0,
        logprobs=None
        if logprobs is False
        else Fields({"logprobs": logprobs}).integer("logprobs", 0, MAX_LOGPROBS),
        token_ids=fields.boolean("return_token_ids", service.engine.tokenizer is None),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        stream=fields.boolean("stream"),
        include_usage=include_usage,
        usage_so_far=usage_so_far,
        suffix=fields.text("suffix", "", longest=2**31) or "",
    )
    if options.suffix and options.echo:
        raise refuse(
            "echo", True, "false with a suffix", "; the prompt would stand before what fills the middle"
        )
    if options.stream and options.echo and options.logprobs is not None:
        text = "echo with logprobs cannot be streamed: the prompt is judged as a whole; use stream false"
        raise RequestError(text, "stream", "invalid_value", 400)
    return options


def _prompts(fields: Fields) -> dict[str, Any]:
    """One or many prompts by their places in the body, which are to be text or token ids."""
    prompt = fields.get("prompt")
    if prompt is None:
        raise RequestError(
            "prompt is missing; it takes text or token ids, or a list of such", "prompt", "missing_field", 400
        )
    if isinstance(prompt, (str, np.ndarray)) or (
        isinstance(prompt, list) and prompt and type(prompt[0]) in (int, float)
    ):
        return {"prompt": prompt}
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_PROMPTS:
        raise refuse("prompt", prompt, f"text or token ids, or a list of 1 to {MAX_PROMPTS} such")
    return {f"prompt[{i}]": one for i, one in enumerate(prompt)}


async def _prompt_ids(call: Call, name: str, prompt: Any, salt: str, suffix: str) -> np.ndarray:
    """The prompt in the field `name` as int32 [tokens]."""
    service = call.service
    if suffix:
        if not isinstance(prompt, str):
            raise refuse(name, prompt, "text where there is a suffix")
        return await service.fill_in(prompt, suffix, service.bound("prompt"), salt=salt)
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError(
                f"{name} is empty; it needs at least one token", "prompt", "invalid_value", 400
            )
        return await service.encode(prompt, service.bound("prompt"), salt=salt)
    if not isinstance(prompt, (list, np.ndarray)) or not len(prompt):
        raise refuse(name, prompt, "text or at least one token id")
    return await call.aside(lambda: token_ids(name, prompt, service.vocab_size))


class Answer:
    """Builds the JSON of an answer, whole or in chunks."""

    def __init__(
        self, service: Service, options: Options, id: str, created: int, prompts: Sequence[np.ndarray]
    ) -> None:
        self.service, self.options, self.prompts = service, options, prompts
        self.usage = UsageSum(per_prompt=options.n)
        if options.nothing:
            self.usage.hidden_tokens = 1
        self._head = {"id": id, "object": "text_completion", "created": created, "model": options.model}
        self._offsets: dict[int, int] = {}
        self._counts = dict.fromkeys(range(len(prompts) * options.n), 0)

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The answer of a request that was not streamed."""
        shown = [self._choice(i, reply) for i, reply in enumerate(replies)]
        return {**self._head, "choices": shown, "usage": usage_body(self.usage)}

    def chunk(self, index: int, output: RequestOutput) -> bytes:
        """A frame with what one output brought; nothing when it only reports progress."""
        tokens = [] if self.options.nothing else output.token_ids
        if not tokens and not output.text and not output.finished:
            return b""
        choice: dict[str, Any] = {"index": index, "text": "" if self.options.nothing else output.text}
        if self.options.logprobs is not None and tokens:
            judged = output.logprobs or []
            offset = self._offsets.get(index, 0)
            choice["logprobs"] = self._logprobs(tokens, judged, offset)
            self._offsets[index] = offset + sum(map(len, choice["logprobs"]["tokens"]))
        else:
            choice["logprobs"] = None
        choice["finish_reason"] = self._reason(output.finish_reason)
        if output.finished:
            choice["stop_reason"] = output.stop_reason
        if self.options.token_ids:
            choice["token_ids"] = tokens
        self._counts[index] += len(tokens)
        return self._frame([choice])

    def echo(self, index: int) -> bytes:
        """The frame that repeats a prompt."""
        prompt = self.prompts[index // self.options.n]
        choice = {"index": index, "text": self._text(prompt), "logprobs": None, "finish_reason": None}
        if self.options.token_ids:
            choice["token_ids"] = prompt.tolist()
        return self._frame([choice])

    def end(self) -> bytes:
        """The usage, when asked for, and the terminal event."""
        last = b"data: [DONE]\n\n"
        return self._frame([], usage=usage_body(self.usage)) + last if self.options.include_usage else last

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self.options.include_usage:
            body["usage"] = usage
        if self.options.usage_so_far and choices:
            index = choices[0]["index"]
            body["usage"] = usage_so_far(len(self.prompts[index // self.options.n]), self._counts[index])
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        shown_ids, text, prompt = reply.token_ids, reply.blocks.content, self.prompts[index // self.options.n]
        judged = list[Sampled | None](reply.logprobs)
        if self.options.nothing:
            shown_ids, text, judged = [], "", []
        if self.options.echo:
            shown_ids, text = prompt.tolist() + shown_ids, self._text(prompt) + text
            judged = reply.prompt_logprobs + judged
        answer: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self.options.logprobs is not None:
            answer["logprobs"] = self._logprobs(shown_ids, judged, 0)
        answer |= {"finish_reason": self._reason(reply.finish_reason), "stop_reason": reply.stop_reason}
        if self.options.token_ids:
            answer |= {"token_ids": shown_ids, "prompt_token_ids": prompt.tolist()}
        return answer

    def _reason(self, reason: str | None) -> str | None:
        return "length" if self.options.nothing and reason else reason

    def _text(self, tokens: np.ndarray) -> str:
        tokenizer = self.service.engine.tokenizer
        return tokenizer.decode(tokens, skip_special=False) if tokenizer is not None else ""

    def _logprobs(
        self, tokens: Sequence[int], judged: Sequence[Sampled | None], offset: int
    ) -> dict[str, Any]:
        """Parallel lists per token, as this endpoint has them; a prompt's first token has no probability."""
        top = self.options.logprobs or 0
        piece = functools.partial(self.service.piece, as_id=self.options.tokens_as_ids)
        texts, offsets = [piece(t) for t in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        best = [
            None if s is None else {piece(t): p for t, p in (*s.top[:top], (s.token, s.logprob))}
            for s in judged
        ]
        return {
            "tokens": texts,
            "token_logprobs": [None if s is None else s.logprob for s in judged],
            "top_logprobs": best if top else None,
            "text_offset": offsets,
        }


async def _stream(call: Call, answer: Answer, jobs: Sequence[Any]) -> None:
    async with EventStream(call, on_error=error_event) as stream:
        shown: set[int] = set()
        async for index, output in run(call, jobs):
            if output.prefilled is not None:
                stream.progress = f"prefill {output.prefilled}/{len(jobs[index].prompt)}"
            answer.usage.add(index, output)
            frame = answer.chunk(index, output)
            if frame and answer.options.echo and index not in shown:
                shown.add(index)
                frame = await call.aside(functools.partial(answer.echo, index)) + frame
            if frame:
                await stream.send(frame)
        await stream.send(answer.end())


def _post(path: str, summary: str) -> Post:
    told = Operation(
        summary,
        "CompletionAnswer",
        "CompletionRequest",
        OF_A_GENERATION,
        f"{EVENTS}: chunks as `data:`, then `[DONE]`.",
        example={"prompt": "Hi", "max_tokens": 4},
    )
    return Post(path, completions, told, generates=True)


DIALECT = Dialect(
    (
        _post("/v1/completions", "Text that follows a text"),
        _post("/beta/completions", "/v1/completions by DeepSeek's name"),
    )
)
