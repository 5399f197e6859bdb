"""From what an engine tells to what callers get: text, log-probabilities, stop strings, the end.

    News (tokens by key) ─▶ Answers ─▶ Answer ─▶ TextStream ─▶ RequestOutput

It runs beside the caller, not beside the steps. What has come since the caller last looked is one output, so a slow reader
gets several tokens at once and costs less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from dsv4.engine.messages import End, News
from dsv4.engine.request import RequestOutput, Sampled, Started, Usage
from dsv4.sampling import SamplingParams
from dsv4.text.output import Content, Piece, Reasoning
from dsv4.text.stream import TextStream

log = logging.getLogger("dsv4.engine")

TURN = 256
"""Answers that are woken at a time. Each is a task, which writes to its client: some ten milliseconds in all."""

HANDED = 16 * TURN
"""Tokens and ends that are handed out at a time. Those of an answer that is woken already are written with what woke it."""


@dataclass(slots=True)
class _Pending:
    """What the caller has not seen."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    logprobs: list[Sampled] = field(default_factory=list)
    prefilled: int | None = None


class Answer:
    """One request as its caller sees it."""

    __slots__ = (
        "_end",
        "_last",
        "_pending",
        "_prompt_logprobs",
        "_started",
        "_stream",
        "begun",
        "ends",
        "fault",
        "key",
        "news",
        "on_news",
        "params",
        "prompt",
        "request_id",
        "tokens",
    )

    def __init__(
        self,
        key: int,
        request_id: str,
        prompt: np.ndarray,
        params: SamplingParams,
        stream: TextStream | None,
        eos_ids: frozenset[int],
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        """`stream`: None where there is no text to be had. `on_news`: called when there is something to `take`."""
        self.key, self.request_id, self.prompt, self.params = key, request_id, prompt, params
        self.on_news = on_news
        self.ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._stream, self._last = stream, eos_ids
        self.tokens = 0
        """Tokens of the answer so far."""
        self.begun = False
        """It is being computed, or was: an engine that ends takes it along."""
        self.news = False
        """Whether there is something to `take`."""
        self.fault: Exception | None = None
        """What the caller gets in place of an answer: it was not taken."""
        self._pending = _Pending()
        self._started: Started | None = None
        self._prompt_logprobs: list[Sampled | None] = [None]
        self._end: dict[str, Any] = {}

    @property
    def whole(self) -> bool:
        """Nothing more belongs to it, though the engine goes on: a stop string was found, or the last call is whole."""
        return self._stream is not None and self._stream.ended

    def start(self, cached: int) -> None:
        """It begins to be computed."""
        self.begun = True
        self._started = Started(len(self.prompt), cached)
        self._tell()

    def prefill(self, tokens: int) -> None:
        self._pending.prefilled = tokens
        self._tell()

    def judge_prompt(self, judged: list[Sampled]) -> None:
        self._prompt_logprobs += judged

    def push(self, token: int, judged: Sampled | None) -> bool:
        """A token. True when the answer is whole with it, though the engine does not know that."""
        stream, pending = self._stream, self._pending
        if stream is not None and stream.ended:
            return False
        self.tokens += 1
        pending.token_ids.append(token)
        if self.params.logprobs is not None:
            pending.logprobs.append(judged or Sampled(token))
        if not self.news:
            self._tell()
        if stream is None:
            return False
        pieces = stream.push(token, ends=token in self.ends)
        if pieces:
            pending.pieces += pieces
        return stream.ended

    def finish(self, end: End) -> None:
        """The engine has ended it."""
        stream, whole = self._stream, self.whole
        if stream is not None:
            self._pending.pieces += stream.finish(cut=end.reason != "stop" and not whole)
        stopped: str | int | None = None if end.stop_token < 0 else end.stop_token
        if stream is not None and stream.stop_string is not None:
            stopped = stream.stop_string
        if isinstance(stopped, int) and stopped in self._last:
            stopped = None
        usage = Usage(
            len(self.prompt),
            self.tokens,
            end.explanation["cached_tokens"],
            end.explanation,
            stream.reasoning_tokens if stream is not None else 0,
            end.timing,
        )
        reason = "error" if end.error else "stop" if whole else end.reason
        self._finished(
            finish_reason=reason,
            stop_reason=stopped,
            error=end.error,
            error_field=end.error_field,
            usage=usage,
        )

    def fail(self, error: str) -> None:
        """It ends without the engine, which is no more."""
        self._finished(finish_reason="error", error=error)

    def cut(self) -> None:
        """It ends before it has begun."""
        self._finished(finish_reason="abort")

    def refuse(self, error: Exception) -> None:
        """It is not taken."""
        self.fault = error
        self._tell()

    def _finished(self, **fields: Any) -> None:
        wanted = self.params.prompt_logprobs is not None and self.begun
        fields["prompt_logprobs"] = self._prompt_logprobs if wanted else None
        self._end = {"finished": True, **fields}
        self._tell()

    def _tell(self) -> None:
        if not self.news:
            self.news = True
            self.on_news()

    def take(self) -> Iterator[RequestOutput]:
        """What has come since the last time: its start, which is an output of its own, and one output with all else. The last one
        has `finished`. Raises `fault`."""
        self.news = False
        if self.fault is not None:
            raise self.fault
        started, self._started = self._started, None
        if started is not None:
            yield RequestOutput(self.request_id, started=started)
        pending, end = self._pending, self._end
        if not end and not pending.token_ids and pending.prefilled is None:
            return
        self._pending = _Pending()
        yield RequestOutput(
            self.request_id,
            pending.token_ids,
            _joined(pending.pieces),
            logprobs=pending.logprobs if self.params.logprobs is not None else None,
            prefilled=pending.prefilled,
            **end,
        )


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of text as one."""
    if len(pieces) < 2:
        return pieces
    joined: list[Piece] = []
    for kind, some in groupby(pieces, type):
        if kind is Content or kind is Reasoning:
            joined.append(kind("".join([piece.text for piece in some])))  # type: ignore[union-attr]
        else:
            joined += some
    return joined


class Answers:
    """The live requests of one caller. Not thread-safe."""

    def __init__(self) -> None:
        self.live: dict[int, Answer] = {}
        """By key, those that have not ended."""
        self._woken = self._handed = 0

    def read(self, news: News) -> list[int]:
        """Gives each request what is its own. Returns those that are whole and have to be stopped."""
        turns = self.turns(news)
        while True:
            try:
                next(turns)
            except StopIteration as e:
                whole: list[int] = e.value
                return whole

    def turns(self, news: News) -> Generator[None, None, list[int]]:
        """The same with pauses, in which others have their turn: before more than TURN answers are woken, or HANDED tokens handed out."""
        live, whole = self.live, list[int]()
        for key, _, cached in news.started:
            if (answer := live.get(key)) is not None:
                answer.start(cached)
        for key, tokens in news.prefilled:
            if (answer := live.get(key)) is not None:
                answer.prefill(tokens)
        for key, judged in news.prompts:
            if (answer := live.get(key)) is not None:
                answer.judge_prompt(judged)
        told, broken = dict(news.judged), list[int]()
        for place, (key, token) in enumerate(news.samples()):
            if (answer := live.get(key)) is None:
                continue
            if self._is_over(answer):
                yield
                if key not in live:
                    continue
            try:
                if answer.push(token, told.get(place)):
                    whole.append(key)
            except Exception as e:  # a fault of ours in one answer's text must not cost the others
                self._give_up(answer, e)
                broken.append(key)
        for end in news.ends:
            if (answer := live.get(end.key)) is not None:
                if self._is_over(answer):
                    yield
                if live.pop(end.key, None) is None:
                    continue
                try:
                    answer.finish(end)
                except Exception as e:
                    self._give_up(answer, e)
        return [*(key for key in whole if key in live), *broken]

    def _is_over(self, answer: Answer) -> bool:
        """Whether a turn is over before `answer` gets what has come."""
        self._handed += 1
        self._woken += not answer.news
        if self._handed <= HANDED and self._woken <= TURN:
            return False
        self._handed = self._woken = 1
        return True

    def _give_up(self, answer: Answer, error: Exception) -> None:
        log.error("the answer to %s cannot be read", answer.request_id, exc_info=error)
        self.live.pop(answer.key, None)
        answer.fail(f"the answer cannot be read: {type(error).__name__}: {error}")
