"""A whole run: a first look at the server, then its stages one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import uvloop

from dsv4.bench.answer import Answer
from dsv4.bench.client import TOKENIZE, Client, Target
from dsv4.bench.connection import clock
from dsv4.bench.conversation import TOOLS, History
from dsv4.bench.figures import Stage, share_kept
from dsv4.bench.goals import Goal
from dsv4.bench.lag import Lag
from dsv4.bench.load import Driver, Limits, Load
from dsv4.bench.load import Maker as SessionMaker
from dsv4.bench.search import Found, highest
from dsv4.bench.shapes import Maker, Plan
from dsv4.bench.sizing import GUESS, SAMPLE, Sizing, counted
from dsv4.bench.trace import Record, TraceMaker
from dsv4.bench.words import Words
from dsv4.errors import ConfigError, RequestError

TOLD_EVERY = 0.25
"""Seconds between looks at how far a stage is."""
LOOK = 8
"""Tokens of the first answer, which shows that the server takes the fields that will be sent."""


class Progress(Protocol):
    """Is told how far a stage is."""

    def __call__(self, name: str, driver: Driver) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. Either `trace` or a shape of `plan`."""

    target: Target
    plan: Plan
    loads: Sequence[Load]
    limits: Limits
    body: dict[str, Any]
    history: History = "scripted"
    goals: Sequence[Goal] = ()
    goal_share: float = 0.95
    search: bool = False
    precision: float = 0.1
    trace: Sequence[Record] | None = None
    trace_block: int = 512
    timeout: float = 600.0
    warmup: int = 0
    """Sessions that run one at a time before, and are not counted."""


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    sizing: Sizing = GUESS
    stages: list[Stage] = field(default_factory=list)
    found: Found | None = None
    interrupted: bool = False


def run(settings: Settings, progress: Progress, say: Callable[[str], None]) -> Outcome:
    """Runs it in an event loop of its own. `say` takes lines. Ctrl-C ends the stage that runs; what there is comes back. Raises
    ConfigError where the first look fails."""
    loop = uvloop.new_event_loop()
    runner = _Runner(settings, progress, say)
    try:
        with _interrupts(loop, runner.interrupt):
            loop.run_until_complete(runner.whole())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    return runner.outcome


@contextlib.contextmanager
def _interrupts(loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> Iterator[None]:
    try:
        loop.add_signal_handler(signal.SIGINT, then)
    except (ValueError, RuntimeError):  # not the main thread, which gets no signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _Runner:
    """State of a run."""

    def __init__(self, settings: Settings, progress: Progress, say: Callable[[str], None]) -> None:
        self.settings, self.progress, self.say = settings, progress, say
        self.outcome = Outcome()
        self.words = Words(settings.plan.seed)
        self._driver: Driver | None = None
        self._looking: asyncio.Task[Any] | None = None

    def interrupt(self) -> None:
        self.outcome.interrupted = True
        if self._driver is not None:
            self._driver.stop()
        elif self._looking is not None:
            self._looking.cancel()

    async def whole(self) -> None:
        client = Client(self.settings.target, timeout=self.settings.timeout)
        try:
            if not await self._look(self._first_look(client)):
                return
            for _ in range(1 if self.settings.warmup else 0):
                warm = Limits(sessions=self.settings.warmup)
                await self._stage(client, Load(concurrency=1), warm, -1, "warm-up")
            if self.settings.search:
                await self._search(client)
                return
            for number, load in enumerate(self.settings.loads):
                if self.outcome.interrupted:
                    return
                self.outcome.stages.append(
                    await self._stage(client, load, self.settings.limits, number, str(load))
                )
        finally:
            client.close()

    async def _look(self, work: Coroutine[Any, Any, None]) -> bool:
        """False where it was interrupted."""
        self._looking = asyncio.ensure_future(work)
        try:
            await self._looking
        except asyncio.CancelledError:
            if not self.outcome.interrupted:
                raise
            return False
        finally:
            self._looking = None
        return True

    async def _search(self, client: Client) -> None:
        s = self.settings

        async def tried(rate: float) -> bool:
            if self.outcome.interrupted:
                return False
            load = Load(rate=rate)
            stage = await self._stage(client, load, s.limits, len(self.outcome.stages), str(load))
            self.outcome.stages.append(stage)
            if stage.interrupted:
                return False
            share = share_kept(stage.records, s.goals)
            kept = share >= s.goal_share
            self.say(f"{load}: {share:.1%} of the answers keep the goals, {'enough' if kept else 'too few'}")
            return kept

        first = s.loads[0].rate
        assert first is not None
        found = await highest(tried, first, s.precision)
        self.outcome.stages.sort(key=lambda stage: stage.load.rate or 0.0)
        # Rates "missed" after Ctrl-C were not tried.
        self.outcome.found = None if self.outcome.interrupted else found

    async def _stage(self, client: Client, load: Load, limits: Limits, number: int, name: str) -> Stage:
        s = self.settings
        maker = self._maker(number)
        if isinstance(maker, TraceMaker):
            limits = replace(limits, sessions=min(limits.sessions or len(maker), len(maker)))
        driver = Driver(client, maker, load, limits, s.body, s.history, f"{s.plan.seed}/{number}")
        lag = Lag()
        beside = [asyncio.ensure_future(lag.watch()), asyncio.ensure_future(self._tell(name, driver))]
        cpu, begun = time.process_time(), clock()
        self._driver = driver
        try:
            await driver.run()
        finally:
            self._driver = None
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        wall = max(clock() - begun, 1e-9)
        seconds = np.array(lag.seconds)
        share = (time.process_time() - cpu) / wall
        return Stage(load, driver.records, seconds, share, driver.unsent, self.outcome.interrupted)

    def _maker(self, stage: int) -> SessionMaker:
        s = self.settings
        if s.trace is None:
            return Maker(replace(s.plan, stage=stage), self.words, self.outcome.sizing)
        # An id stands for other text in each stage, so that a sweep does not find what the stage before has left.
        seed = f"{s.plan.seed}/{stage}"
        return TraceMaker(s.trace, self.words, self.outcome.sizing, seed=seed, block=s.trace_block)

    async def _tell(self, name: str, driver: Driver) -> None:
        while True:
            self.progress(name, driver)
            await asyncio.sleep(TOLD_EVERY)

    async def _first_look(self, client: Client) -> None:
        """One short answer with every field that will be sent, and the length of words."""
        s = self.settings
        rng = random.Random(f"{s.plan.seed}/look")
        words = max(min(SAMPLE, s.plan.context.low // 4 if s.trace is None else SAMPLE), 16)
        text = self.words.text(rng, words)
        more: dict[str, Any] = {}
        if s.plan.shape == "agent" and s.trace is None:
            more["tools"] = TOOLS
        if s.plan.shape == "rollout" and s.trace is None:
            more["n"] = s.plan.n
        answer = await self._short(client, text, more)
        self.outcome.sizing = await self._sizing(client, text, words, answer, more)

    async def _short(self, client: Client, text: str, more: dict[str, Any]) -> Answer:
        answer = Answer(clock())
        body = {
            **self.settings.body,
            **more,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": LOOK,
        }
        await client.ask(body, answer)
        if answer.error is not None:
            kind, said = answer.error
            hint = "; give --no-ignore-eos, and outputs may end early" if "ignore_eos" in said else ""
            raise ConfigError(f"a first request to {client.target.url} failed: {kind}: {said}{hint}")
        return answer

    async def _sizing(
        self, client: Client, text: str, words: int, whole: Answer, more: dict[str, Any]
    ) -> Sizing:
        try:
            told = await client.post(TOKENIZE, {"model": client.target.model, "prompt": text})
        except RequestError:
            told = None
        tokens = told.get("count", len(told.get("tokens") or ())) if isinstance(told, dict) else None
        if (found := counted(words, tokens, "tokenize")) is not None:
            return found
        if whole.prompt is None:
            return GUESS
        # Half of the words: what the format and the tools take falls out of the difference.
        half = await self._short(client, " ".join(text.split()[: words // 2]), more)
        difference = None if half.prompt is None else whole.prompt - half.prompt
        return counted(words - words // 2, difference, "usage") or GUESS
