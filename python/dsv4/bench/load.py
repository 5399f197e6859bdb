"""When sessions begin and their turns are sent."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsv4.bench.answer import Answer
from dsv4.bench.client import Client
from dsv4.bench.connection import clock
from dsv4.bench.conversation import TOOLS, History, Message, Session, ask, reply
from dsv4.bench.record import Record


class Maker(Protocol):
    """Of sessions by number."""

    def session(self, number: int) -> Session: ...


@dataclass(frozen=True, slots=True)
class Load:
    """One of: so many sessions at a time, requests a second, or a trace's own times so many times as fast."""

    concurrency: int | None = None
    rate: float | None = None
    speed: float | None = None

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return (
            f"{self.rate:.4g} requests/s" if self.rate is not None else f"the trace's times, {self.speed:g}x"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """When no more is begun; what runs then comes to its end."""

    requests: int | None = None
    seconds: float | None = None
    sessions: int | None = None


@dataclass(slots=True)
class Driver:
    """Sends the sessions of a maker under a load."""

    client: Client
    maker: Maker
    load: Load
    limits: Limits
    body: dict[str, Any]
    """Fields of every request beside messages, tools, lengths."""
    history: History
    seed: str
    """Of arrivals."""
    records: list[Record] = field(default_factory=list)
    live: int = 0
    sent: int = 0
    unsent: int = 0
    """Turns that could not follow, as one before them in their session failed."""
    start: float = 0.0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _stopped: bool = False
    _taken: int = 0
    _numbers: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)

    async def run(self) -> None:
        """Until all that was begun has ended. A Ctrl-C is `stop`."""
        self.start = clock()
        if self.load.concurrency is not None:
            for _ in range(self.load.concurrency):
                self._spawn(self._worker())
        else:
            self._spawn(self._arrivals())
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._tasks.discard(task)
                if not task.cancelled():
                    task.result()  # a fault of ours is raised

    def stop(self) -> None:
        """Ends everything at once; what was under way is recorded as cut."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Any) -> None:
        self._tasks.add(asyncio.ensure_future(work))

    @property
    def _over(self) -> bool:
        seconds = self.limits.seconds
        return self._stopped or (seconds is not None and clock() - self.start >= seconds)

    def _next(self) -> tuple[int, Session, int] | None:
        """(number, session, turns of it that are sent), taken from what may still be begun."""
        if self._over:
            return None
        number = self._numbers()
        if self.limits.sessions is not None and number >= self.limits.sessions:
            return None
        if self.limits.requests is None:
            session = self.maker.session(number)
            return number, session, len(session.turns)
        if (left := self.limits.requests - self._taken) <= 0:
            return None
        session = self.maker.session(number)
        turns = min(len(session.turns), left)
        self._taken += turns
        return number, session, turns

    async def _worker(self) -> None:
        while (taken := self._next()) is not None:
            await self._session(*taken, clock())

    async def _arrivals(self) -> None:
        async for taken, at in self._times():
            if self._over:
                return
            self._spawn(self._session(*taken, at))

    async def _times(self) -> AsyncIterator[tuple[tuple[int, Session, int], float]]:
        """Sessions when they are due: at random, independent of each other, or as a trace says."""
        rng, at = random.Random(f"{self.seed}/arrivals"), self.start
        while (taken := self._next()) is not None:  # made before it is due
            session = taken[1]
            if self.load.rate is not None:
                at += rng.expovariate(self.load.rate / len(session.turns))
            else:
                at = self.start + (session.turns[0].at or 0.0) / (self.load.speed or 1.0)
            if self.limits.seconds is not None and at - self.start >= self.limits.seconds:
                return
            await _until(at)
            yield taken, at

    async def _session(self, number: int, session: Session, turns: int, begin: float) -> None:
        messages, before, due = list(session.opening), None, begin
        for k, turn in enumerate(session.turns[:turns]):
            if k:
                due += turn.delay
                if turn.at is not None and self.load.speed is not None:
                    due = max(due, self.start + turn.at / self.load.speed)
            if not session.chained:
                messages, before = list(session.opening), None
            messages.extend(ask(turn, before))
            await _until(due)
            if k and self._over:
                return
            answer = await self._request(number, k, session, messages, due)
            if answer.error is not None:
                self.unsent += turns - k - 1
                return
            before = self._said(session, k, answer)
            messages.append(before)
            due = answer.end

    def _said(self, session: Session, turn: int, answer: Answer) -> Message:
        return answer.message() if answer.wants_text else reply(session, turn)

    async def _request(
        self, number: int, k: int, session: Session, messages: list[Message], due: float
    ) -> Answer:
        turn = session.turns[k]
        body = {**self.body, "messages": messages, "max_tokens": turn.output}
        if session.tools:
            body["tools"] = TOOLS
        if session.n > 1:
            body["n"] = session.n
        answer = Answer(
            due, wants_text=self.history == "answers" and session.chained and k + 1 < len(session.turns)
        )
        self.live, self.sent = self.live + 1, self.sent + 1
        try:
            await self.client.ask(body, answer)
        except asyncio.CancelledError:
            answer.cut, answer.error = True, None
            raise
        finally:
            self.live -= 1
            made = Record.of(answer, turn, session=number, number=k, start=self.start, n=session.n)
            self.records.append(made)
        return answer


async def _until(at: float) -> None:
    if (left := at - clock()) > 0:
        await asyncio.sleep(left)
