"""Blocking use from Python: `LLM().generate(...)`. No thread, no event loop: the caller's thread drives the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.config import EngineConfig
from dsv4.engine.async_engine import as_request_error
from dsv4.engine.build import Progress, build_engine
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.request import RequestOutput, Usage
from dsv4.engine.routing import Routing
from dsv4.engine.sampler import Sampled
from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.blocks import Blocks, Call
from dsv4.text.chat import encode_chat, ending_of
from dsv4.text.draft import Bound
from dsv4.text.stream import Reading

Prompt = str | TokenIds


@dataclass(slots=True)
class Completion:
    """A finished request."""

    blocks: Blocks = field(default_factory=Blocks, compare=False)
    """The text; in a chat also thoughts and tool calls, in the order they came."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[Sampled] | None = None
    prompt_logprobs: list[Sampled | None] | None = None
    usage: Usage | None = None
    error: str | None = None
    """Why it failed; `LLM` raises it."""

    @property
    def text(self) -> str:
        """The text; of a chat the answer without thoughts and calls."""
        return self.blocks.content

    @property
    def reasoning(self) -> str:
        """The thoughts of a chat."""
        return self.blocks.reasoning

    @property
    def calls(self) -> list[Call]:
        """The tool calls of a chat."""
        return self.blocks.calls

    def add(self, output: RequestOutput) -> None:
        """Appends what a step brought."""
        self.error = output.error
        for piece in output.pieces:
            self.blocks.add(piece)
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        if output.finished:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.prompt_logprobs, self.usage = output.prompt_logprobs, output.usage


class LLM:
    """A model in this process.

    `LLM()` is the small model that ships; `LLM("/path", max_num_seqs=64)` takes every field of `EngineConfig`.
    """

    def __init__(
        self, model: str | None = None, *, progress: Progress | None = None, **settings: Any
    ) -> None:
        built = build_engine(EngineConfig(model=model, **settings), progress)
        self.config, self.model_config, self.tokenizer = built.config, built.model_config, built.tokenizer
        self.max_model_len, self._built, self._loop = built.max_model_len, built, built.loop

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """What the model's generation_config.json (or the settings) say of sampling, as fields of `SamplingParams`."""
        return self._built.generation.sampling

    def get_default_sampling_params(self, **given: Any) -> SamplingParams:
        """What `generate` takes without `params`: the defaults of generation_config.json (see the setting of that name),
        `given` first. Raises ValueError."""
        return self._built.generation.params(**given)

    @property
    def core(self) -> Any:
        """The Rust core, for `stats()`, `explain()`, `check()` and eviction by hand."""
        return self._loop.core

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        reading: Reading | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts. A prompt is text or token ids; `reading`: they are chats, and how the
        answers are to be read. Raises RequestError when one of them is refused or fails, which ends the others of the
        call, and EngineDead when the device is lost."""
        params = params or self.get_default_sampling_params()
        many = [self._ids(p) for p in ([prompts] if _is_one(prompts) else prompts)]
        done = [Completion() for _ in many]
        keys: list[int] = []
        try:
            for completion, ids in zip(done, many, strict=True):
                keys.append(self._submit(ids, params, completion.add, cache_salt, reading))
            while self._loop.has_work() and any(c.finish_reason is None for c in done):
                self._loop.step()
                if failed := next((c.error for c in done if c.error is not None), None):
                    raise RequestError(failed, None, "internal_error", 500)
        finally:
            for key in keys:
                self._loop.abort(key)
        return done

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        reading: Reading | None = None,
    ) -> Iterator[RequestOutput]:
        """What each step brings for one prompt; the last output has `finished`. Closing the iterator aborts the request."""
        news: list[RequestOutput] = []
        params = params or self.get_default_sampling_params()
        key = self._submit(self._ids(prompt), params, news.append, cache_salt, reading)
        try:
            finished = False
            while not finished and self._loop.has_work():
                self._loop.step()
                finished = bool(news) and news[-1].finished
                yield from news
                news.clear()
        finally:
            self._loop.abort(key)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
    ) -> Completion:
        """One assistant turn for OpenAI-style messages, or the rest of the last message where that is to be continued:
        text, `reasoning` and tool `calls`."""
        ending = ending_of(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        ids = self._chat_prompt(
            messages,
            thinking=thinking,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        reading = Reading.of_chat(messages, tools, thinking=thinking, ending=ending)
        return self.generate([ids], params, reading=reading)[0]

    def chat_ids(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        thinking: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
    ) -> list[int]:
        """The prompt of a chat as token ids. `continue_final_message`: the last message, an assistant's, is left open, as
        `prefix: true` in it says too. Raises RequestError, also without a tokenizer."""
        return self._chat_prompt(
            messages,
            thinking=thinking,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        ).tolist()

    def _chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        thinking: bool,
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
    ) -> np.ndarray:
        if self.tokenizer is None:
            raise RequestError(
                "this model directory has no tokenizer; send token ids", "messages", "no_tokenizer", 400
            )
        ending = ending_of(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        format = self._built.chat_format
        segments = encode_chat(messages, thinking=thinking, tools=tools, ending=ending, format=format)
        return self.tokenizer.draft(segments, bound=Bound(self.max_model_len, "messages")).finish()

    def _ids(self, prompt: Prompt) -> np.ndarray:
        if not isinstance(prompt, str):
            return as_prompt(prompt)
        if self.tokenizer is None:
            raise RequestError(
                "this model directory has no tokenizer; send token ids", "prompt", "no_tokenizer", 400
            )
        return self.tokenizer.draft_text(prompt, bound=Bound(self.max_model_len, "prompt")).finish()

    def _submit(
        self, ids: np.ndarray, params: SamplingParams, deliver: Any, salt: str, reading: Reading | None
    ) -> int:
        params = self._built.admissible(ids, params)
        try:
            routing = Routing(salt=salt)
            return self._loop.submit("llm", ids, params, deliver, routing=routing, reading=reading)
        except Exception as e:
            raise as_request_error(e) from None


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    if isinstance(prompts, (str, np.ndarray)):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))
