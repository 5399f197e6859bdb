"""Blocking use from Python: `LLM().generate(...)`. No event loop and no process of its own: the caller's thread drives the engine. Of
several threads each takes steps for all of them, one at a time. With several ranks the others are processes, which end with the `LLM`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.config import EngineConfig, with_profile
from dsv4.engine.answers import Answer, Answers
from dsv4.engine.build import build_engine
from dsv4.engine.frontend import Frontend, check_params, check_routing, salted
from dsv4.engine.messages import News
from dsv4.engine.process import as_request_error
from dsv4.engine.progress import Progress
from dsv4.engine.prompt import TokenIds
from dsv4.engine.request import RequestOutput, Sampled, Usage
from dsv4.engine.routing import PLAIN, Routing
from dsv4.engine.whole import whole
from dsv4.errors import EngineDead, RequestError, show
from dsv4.sampling import Grammar, SamplingParams
from dsv4.text.blocks import Blocks, Call
from dsv4.text.call_grammar import Calls
from dsv4.text.chat import encode_chat, ending_of
from dsv4.text.draft import Bound
from dsv4.text.form import chat_grammar
from dsv4.text.stream import Reading
from dsv4.text.tools import shown_tools

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
    failure: RequestError | None = None
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
        self.failure = output.failure
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
        config = EngineConfig(**with_profile({"model": model, **settings}))
        self._front = Frontend.load(config)
        built = build_engine(config, progress, eos_ids=self._front.eos_ids)
        self.config, self.model_config, self.tokenizer = (
            built.config,
            built.model_config,
            self._front.tokenizer,
        )
        self.max_model_len, self._loop = built.max_model_len, built.loop
        self.memory, self._about = built.memory, built.describe()
        self._keys = itertools.count(1)
        self._lock = threading.RLock()
        """Held by the thread that is in the engine; of a callback's own calls it is the same one."""
        self._answers, self._told = Answers(), deque[News]()
        self._loop.tell = self._told.append
        self._close = weakref.finalize(self, self._loop.close)
        self._waiting: dict[int, tuple[Answer, Callable[[RequestOutput], None]]] = {}
        """By key, who waits for what becomes of a request."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """What the model's generation_config.json (or the settings) say of sampling, as fields of `SamplingParams`."""
        return self._front.generation.sampling

    def get_default_sampling_params(self, **given: Any) -> SamplingParams:
        """What `generate` takes without `params`: the defaults of generation_config.json (see the setting of that name),
        `given` first. Raises ValueError."""
        return self._front.generation.params(**given)

    @property
    def core(self) -> Any:
        """The Rust core, for `stats()`, `explain()`, `check()` and eviction by hand."""
        return self._loop.core

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        reading: Reading | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts. A prompt is text or token ids; `reading`: they are chats, and how the
        answers are to be read. Raises RequestError, which says which, when one of them is refused or fails, which ends the others
        of the call, and EngineDead when the device is lost. Ctrl-C ends the call, and the next one works as before."""
        params = params or self.get_default_sampling_params()
        asked = _each(prompts)
        names = ["" if len(asked) == 1 else f"prompts[{i}]: " for i in range(len(asked))]
        many = [self._ids(prompt, name) for prompt, name in zip(asked, names, strict=True)]
        done = [Completion() for _ in many]
        keys: list[int] = []
        routing = salted(cache_salt)
        try:
            with whole():
                for completion, ids, name in zip(done, many, names, strict=True):
                    with _named(name):
                        keys.append(
                            self.submit(ids, params, completion.add, routing=routing, reading=reading)
                        )
            while self.has_work() and any(c.finish_reason is None for c in done):
                self.step()
                for completion, name in zip(done, names, strict=True):
                    if completion.failure is not None:
                        with _named(name):
                            raise completion.failure
        finally:
            with whole():
                for key in keys:
                    self.abort(key)
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
        news: deque[RequestOutput] = deque()
        params = params or self.get_default_sampling_params()
        ids, routing, key = self._ids(prompt), salted(cache_salt), None
        try:
            with whole():
                key = self.submit(ids, params, news.append, routing=routing, reading=reading)
            finished = False
            while not finished:
                busy = (
                    self.has_work()
                )  # before the look at the news: another thread may bring the last of them
                if news:
                    output = news.popleft()
                    finished = output.finished
                    yield output
                elif busy:
                    self.step()
                else:
                    break
        finally:
            if key is not None:
                with whole():
                    self.abort(key)

    def submit(
        self,
        ids: TokenIds,
        params: SamplingParams,
        deliver: Callable[[RequestOutput], None],
        *,
        routing: Routing = PLAIN,
        parent: int | None = None,
        reading: Reading | None = None,
    ) -> int:
        """Queues a request whose steps the caller takes by hand (`step`), and returns its number. `deliver` gets what each of them
        brings, on the thread that took the step; where it raises, the request ends and the step raises that. `parent`: the number of a
        request whose state it takes over, if that is live. Raises RequestError."""
        check_routing(routing)
        prompt, params = self._front.admissible(ids, params, self.config, self.max_model_len)
        key = next(self._keys)
        answer = self._front.answer(key, f"llm-{key}", prompt, params, reading)
        with self._lock:
            try:
                self._loop.submit(key, prompt, params, routing=routing, parent=parent)
            except Exception as e:
                raise as_request_error(e) from None
            self._answers.live[key] = answer
            self._waiting[key] = answer, deliver
        return key

    def step(self) -> bool:
        """One step of all requests. False when there was nothing to do. Ctrl-C is raised when the step is over, a second one at
        once, after which every request is refused. Raises EngineDead when the device is lost."""
        with self._lock, whole():
            try:
                busy = self._loop.step()
                self._deliver()
            except (KeyboardInterrupt, SystemExit):
                self._loop.dead = EngineDead(
                    "the engine was interrupted in the middle of a step; make a new LLM"
                )
                raise
        return busy

    def has_work(self) -> bool:
        """Whether a step would do something."""
        with self._lock:
            return self._loop.has_work()

    def abort(self, key: int) -> None:
        """Ends a request at any time; one that has ended, or never was, is ignored."""
        with self._lock:
            self._loop.abort(key)
            self._deliver()

    def close(self) -> None:
        """Ends what runs, the processes of other ranks and the telling of events at once; without them, or when nothing holds the `LLM`
        any more, there is no need to. What is asked later is refused."""
        with self._lock:
            if self._close.alive and self._loop.dead is None:
                self.abort_all()
            self._close()

    def abort_all(self) -> None:
        """Ends every request."""
        with self._lock:
            for key in list(self._loop.requests):
                self._loop.abort(key)
            self._deliver()

    def _deliver(self) -> None:
        while self._told:
            for key in self._answers.read(self._told.popleft()):
                self._loop.stop(key)  # which tells more
        failed: BaseException | None = None
        for key, (answer, deliver) in list(self._waiting.items()):
            if not answer.news:
                continue
            if key not in self._answers.live:
                self._waiting.pop(key, None)  # a callback may have taken a step of its own
            try:
                for output in answer.take():
                    deliver(output)
            except BaseException as e:
                failed = failed or e
                self._waiting.pop(key, None)
                self._loop.abort(key)
        if failed is not None:
            raise failed

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
        params = params or self.get_default_sampling_params()
        check_params(params)
        if params.grammar is None and reading.tools and self.tokenizer is not None:
            calls = Calls(shown_tools(messages, tools))
            text = chat_grammar(self.tokenizer, thinking=reading.thinking, calls=calls)
            params = dataclasses.replace(params, grammar=text and Grammar(text, "tools", chat=True))
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
        format = self._front.chat_format
        segments = encode_chat(messages, thinking=thinking, tools=tools, ending=ending, format=format)
        return self.tokenizer.draft(segments, bound=Bound(self.max_model_len, "messages")).finish()

    def describe(self) -> list[str]:
        """The memory plan and every choice made, one line each."""
        return self._front.describe(self._about)

    def _ids(self, prompt: Prompt, name: str = "") -> TokenIds:
        if not isinstance(prompt, str):
            return prompt
        with _named(name):
            if self.tokenizer is None:
                raise RequestError(
                    "this model directory has no tokenizer; send token ids", "prompt", "no_tokenizer", 400
                )
            return self.tokenizer.draft_text(prompt, bound=Bound(self.max_model_len, "prompt")).finish()


def _each(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts, of which one may come alone. Raises RequestError for what holds none."""
    if isinstance(prompts, (str, np.ndarray)):
        return [prompts]
    if isinstance(prompts, (Mapping, bytes)) or not isinstance(prompts, Iterable):
        text = f"prompts is {show(prompts)}; it takes text, token ids, or a list of such"
        raise RequestError(text, "prompts", "invalid_value", 400)
    found: list[Any] = list(prompts)
    return [found] if found and isinstance(found[0], (int, np.integer)) else found


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts which of several prompts it is in front of why it is refused."""
    try:
        yield
    except RequestError as e:
        raise RequestError(f"{name}{e.message}", e.param, e.code, e.status) from None
