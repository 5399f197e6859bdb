"""Runs the choices of one HTTP request against the engine and merges what they bring."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.api.accounting import Generation
from dsv4.api.http import Call
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import PLAIN, Routing
from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.stream import Reading


@dataclass(frozen=True, slots=True)
class Job:
    """One choice of an answer."""

    index: int
    prompt: np.ndarray
    """int32 [tokens]."""
    params: SamplingParams
    routing: Routing = PLAIN
    parent: int | None = None
    """The first choice of the same prompt, whose state this one takes over: a prompt is computed once."""
    reading: Reading | None = None
    """How the answer of a chat is to be read."""


def jobs_for(
    prompts: Sequence[np.ndarray],
    params: SamplingParams,
    n: int,
    routing: Routing = PLAIN,
    reading: Reading | None = None,
) -> list[Job]:
    """`n` choices per prompt, numbered prompt by prompt. With a seed, choice k takes `seed + k`, else all
    were equal."""
    jobs: list[Job] = []
    for prompt in prompts:
        first = len(jobs)
        for k in range(n):
            own = (
                params if k == 0 or params.seed is None else dataclasses.replace(params, seed=params.seed + k)
            )
            jobs.append(Job(len(jobs), prompt, own, routing, first if k else None, reading))
    return jobs


async def run(call: Call, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(choice, output) as they come, until every choice has finished. Closing it aborts all of them.

    A choice that ends with `error` or `abort` raises RequestError (400, 500, 503) and takes its siblings along:
    half an answer is not what was asked for.
    """
    if len(jobs) == 1:
        async with contextlib.aclosing(_one(call, jobs[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    news: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_pump(call, job, news)) for job in jobs]
    left = len(jobs)
    try:
        while left:
            index, what = await news.get()
            if isinstance(what, BaseException):
                raise what
            left -= what.finished
            yield index, what
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(call: Call, job: Job, news: asyncio.Queue[tuple[int, RequestOutput | BaseException]]) -> None:
    try:
        async with contextlib.aclosing(_one(call, job)) as outputs:
            async for output in outputs:
                news.put_nowait((job.index, output))
    except Exception as e:
        news.put_nowait((job.index, e))


async def _one(call: Call, job: Job) -> AsyncGenerator[RequestOutput, None]:
    meter, routing, again = call.caller.meter, job.routing, job.parent is not None
    if routing.session is not None:
        routing = dataclasses.replace(routing, session=meter.tenant.session(routing.session))
    params = meter.admit(
        0 if again else len(job.prompt),
        job.params,
        refuse=call.service.engine.config.max_tokens_overflow == "refuse",
    )
    generation = Generation(call.service.metrics, call.record, meter, len(job.prompt), params, again=again)
    request_id = f"{call.request_id}-{job.index}"
    stream = call.service.engine.generate(
        job.prompt,
        params,
        request_id=request_id,
        routing=routing,
        fork_of=None if job.parent is None else f"{call.request_id}-{job.parent}",
        reading=job.reading,
    )
    try:
        async with contextlib.aclosing(stream) as outputs:
            async for output in outputs:
                generation.step(output)
                if output.finished:
                    _raise_if_cut(output)
                yield output
    except RequestError:  # it was not taken
        generation.refused()
        raise
    finally:
        generation.close()


def _raise_if_cut(output: RequestOutput) -> None:
    if (failure := output.failure) is not None:
        raise failure
    if output.finish_reason == "abort":
        raise RequestError("the generation was cut off: the server is shutting down", None, "aborted", 503)


@dataclass(slots=True)
class UsageSum:
    """Token counts of all choices. A prompt counts once, whatever its `n`; so does what of it was cached."""

    per_prompt: int
    """Choices per prompt (`n`)."""
    hidden_tokens: int = 0
    """Tokens of each choice that were computed but are not part of the answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    explanations: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, index: int, output: RequestOutput) -> None:
        """Adds the counts of a finished choice; other outputs have none."""
        usage = output.usage
        if usage is None:
            return
        self.completion_tokens += usage.completion_tokens - self.hidden_tokens
        self.reasoning_tokens += usage.reasoning_tokens
        if index % self.per_prompt == 0:
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.explanations[index // self.per_prompt] = usage.explanation

    def explanation(self) -> Any:
        """Why so much and no more was reused: one object, or for several prompts a list in their order."""
        ordered = [self.explanations[i] for i in sorted(self.explanations)]
        return ordered[0] if len(ordered) == 1 else ordered
