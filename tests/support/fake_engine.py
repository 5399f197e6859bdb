"""An engine without a model: the interface of `AsyncEngine`, tokens from a script, and counts of what is
alive."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from types import SimpleNamespace
from typing import Any

from dsv4.config import EngineConfig
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.request import RequestOutput, Sampled, Started, Usage
from dsv4.engine.routing import PLAIN, Routing
from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.chat_format import GA
from dsv4.text.stream import Reading, TextStream
from dsv4.text.tokenizer import Tokenizer

Script = Callable[[Sequence[int]], str | Sequence[int]]
"""What the model answers to a prompt: text (special tokens recognised) or token ids. An end of sentence is
added."""

EOS = 1


def small_tokenizer() -> Tokenizer:
    """The tokenizer of the small model that ships."""
    tokenizer = Tokenizer.from_dir(str(resources.files("dsv4") / "data" / "nano"), vocab_size=8192)
    assert tokenizer is not None
    return tokenizer


class FakeEngine:
    """Streams one token per step. Deterministic: token i of the script is the answer's token i; `ignore_eos`
    repeats it.

    Every token's log-probability is -(i % 7) / 8; the alternatives are the ids that follow it.
    """

    def __init__(
        self,
        script: Script = lambda prompt: "one two three four five",
        *,
        tokenizer: Tokenizer | None = None,
        step_seconds: float = 0.0,
        prefill_steps: int = 0,
        max_model_len: int = 4096,
        max_live: int = 1000,
        fail_after: int | None = None,
        failure: tuple[str, str | None] = ("the step failed: boom", None),
    ) -> None:
        """`fail_after`: requests end with an error after so many tokens; `failure`: what it says, and the field at
        fault. `max_live`: more requests are refused with 429."""
        self.script, self.tokenizer, self.step_seconds, self.prefill_steps = (
            script,
            tokenizer,
            step_seconds,
            prefill_steps,
        )
        self.max_model_len, self.max_live, self.fail_after = max_model_len, max_live, fail_after
        self.failure = failure
        self.config, self.chat_format = EngineConfig(), GA
        self.sampling_defaults: dict[str, Any] = {}
        self.model_config = SimpleNamespace(vocab_size=8192)
        self.pid, self.restarts = os.getpid(), 0
        self.live = self.begun = self.aborted = 0
        self.cached_tokens = 0
        """What every request reports as cached."""
        self.seen: list[SimpleNamespace] = []
        """Every request taken: prompt, params, routing, fork_of, reading."""
        self.pins: dict[int, tuple[list[int], str]] = {}
        self.ended: list[str] = []
        self.asked: list[tuple[Any, ...]] = []
        self.unwell: str | None = None
        """What /health says, with 503."""
        self.died: str | None = None
        """The engine has ended by itself: the server ends too."""
        self._draining = self._cut = False

    async def generate(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        routing: Routing = PLAIN,
        fork_of: str | None = None,
        reading: Reading | None = None,
    ) -> AsyncIterator[RequestOutput]:
        params = self._admit(prompt, params)
        prompt = as_prompt(prompt).tolist()
        self.seen.append(
            SimpleNamespace(prompt=prompt, params=params, routing=routing, fork_of=fork_of, reading=reading)
        )
        request_id = request_id or f"fake-{self.begun}"
        self.begun += 1
        self.live += 1
        finished = False
        try:
            async for output in self._outputs(request_id, prompt, params, reading):
                finished = output.finished
                yield output
        finally:
            self.live -= 1
            self.aborted += not finished

    def _admit(self, prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
        if self.died is not None:
            raise RequestError(self.died, None, "engine_dead", 503)
        if self._draining:
            raise RequestError("the server is shutting down and takes no new requests", None, "draining", 503)
        if self.live >= self.max_live:
            raise RequestError("the queue is full", None, "overloaded", 429)
        room, wanted = self.max_model_len - len(prompt), params.max_tokens
        if room < (0 if wanted == 0 else 1):
            text = f"prompt has {len(prompt)} tokens, the context holds {self.max_model_len}"
            raise RequestError(text, "prompt", "context_length_exceeded", 400)
        if params.min_tokens > room:
            text = f"min_tokens is {params.min_tokens}; after this prompt the context holds {room} tokens"
            raise RequestError(text, "min_tokens", "context_length_exceeded", 400)
        fits = wanted is not None and wanted <= room
        return params if fits else dataclasses.replace(params, max_tokens=room)

    async def _outputs(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, reading: Reading | None
    ) -> AsyncIterator[RequestOutput]:
        yield RequestOutput(
            request_id, started=Started(len(prompt), min(self.cached_tokens, len(prompt) - 1))
        )
        for step in range(self.prefill_steps):
            await asyncio.sleep(self.step_seconds)
            yield RequestOutput(request_id, prefilled=len(prompt) * (step + 1) // self.prefill_steps)
        tokens, done = self._tokens(prompt, params), 0
        stream = TextStream(self.tokenizer, params, reading) if self.tokenizer is not None else None
        while True:
            await asyncio.sleep(self.step_seconds)
            token = tokens[done % len(tokens)]
            done += 1
            reason, pieces = self._reason(token, done, params), []
            if stream is not None:
                pieces = stream.push(token, ends=reason == "stop")
                if reason is not None or stream.ended:
                    pieces += stream.finish(cut=reason != "stop" and not stream.ended)
                reason = "stop" if stream.ended else reason
            yield RequestOutput(
                request_id,
                [token],
                pieces,
                logprobs=[self._judge(token, done - 1, params.logprobs)]
                if params.logprobs is not None
                else None,
                prompt_logprobs=self._prompt_logprobs(prompt, params) if reason else None,
                finished=reason is not None,
                finish_reason=reason,
                stop_reason=stream.stop_string if stream is not None else None,
                error=self.failure[0] if reason == "error" else None,
                error_field=self.failure[1] if reason == "error" else None,
                usage=self._usage(prompt, done, stream) if reason else None,
            )
            if reason is not None:
                return

    def _tokens(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        answer = self.script(prompt)
        if isinstance(answer, str):
            answer = self.tokenizer.encode(answer) if self.tokenizer is not None else list(answer.encode())
        return list(answer) if params.ignore_eos else [*answer, EOS]

    def _reason(self, token: int, done: int, params: SamplingParams) -> str | None:
        if self._cut:
            return "abort"
        if self.fail_after is not None and done > self.fail_after:
            return "error"
        if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
            return "stop"
        return "length" if done == params.max_tokens else None

    @staticmethod
    def _judge(token: int, place: int, top: int | None) -> Sampled:
        own = -(place % 7) / 8
        return Sampled(token, own, 1, tuple((token + k, own - k) for k in range(top or 0)))

    def _prompt_logprobs(self, prompt: Sequence[int], params: SamplingParams) -> list[Sampled | None] | None:
        if params.prompt_logprobs is None:
            return None
        return [None, *(self._judge(t, i, params.prompt_logprobs) for i, t in enumerate(prompt[1:]))]

    def _usage(self, prompt: Sequence[int], done: int, stream: TextStream | None) -> Usage:
        cached = min(self.cached_tokens, len(prompt) - 1)
        explanation = {
            "history_matched": cached,
            "resumed_at": cached,
            "replayed": 0,
            "reason": "never_stored",
        }
        return Usage(len(prompt), done, cached, explanation, stream.reasoning_tokens if stream else 0)

    async def drain(self, timeout: float) -> bool:
        self._draining = True
        end = time.monotonic() + timeout
        while self.live and time.monotonic() < end:
            await asyncio.sleep(0.01)
        cut = self._cut = self.live > 0
        while self.live:
            await asyncio.sleep(0.01)
        return not cut

    async def pin(self, tokens: TokenIds, salt: str = "") -> int:
        self.pins[len(self.pins) + 1] = (as_prompt(tokens).tolist(), salt)
        return len(self.pins)

    def may_hold(self, pin: int) -> bool:
        return pin in self.pins

    async def unpin(self, pin: int) -> bool:
        return self.pins.pop(pin, None) is not None

    async def end_session(self, key: str) -> bool:
        self.ended.append(key)
        return key == "known"

    async def ask(self, what: str, *arguments: Any) -> Any:
        self.asked.append((what, *arguments))
        return {"clear_prefix": 7}[what]

    async def explain(self, request_id: str) -> list[dict[str, Any]]:
        return [{"reason": "none"}] if request_id == "live" else []

    async def dump(self) -> str:
        return "{}"

    def tenants(self) -> dict[str, dict[str, float]]:
        return {"": {"live": self.live, "tokens": 5, "prefill_us": 1.5}}

    async def shutdown(self) -> None:
        """Nothing to stop."""

    def stats(self) -> dict[str, Any]:
        return {
            "pages": 100,
            "free_pages": 100 - self.live - len(self.pins),
            "available_pages": 100 - self.live - len(self.pins),
            "pinned_pages": len(self.pins),
            "cached_pages": 0,
            "running": self.live,
            "waiting": 0,
            "steps": 7,
            "prompt_tokens": sum(len(request.prompt) for request in self.seen),
            "resumed_tokens": 0,
            "preemptions": 0,
        }

    def describe(self) -> list[str]:
        return ["model      fake: no weights at all"]

    def check_alive(self) -> tuple[bool, str]:
        wrong = self.died or self.unwell
        return wrong is None, wrong or "ok"
