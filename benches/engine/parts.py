"""What is measured, the most valuable first, each with the least time that the machine allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benches.engine.decode import decode
from benches.engine.driver import Driver
from benches.engine.limits import Limits
from benches.engine.prefill import beside, cached, cold, first, turns

PARTS = ("first", "decode", "prefill", "cached", "turns", "beside", "long")
NEW = (1, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement."""

    name: str
    run: Callable[[Driver], dict[str, Any]]
    limit: Callable[[Limits], float]
    """Milliseconds, of `against`."""
    against: str
    """The figure that the limit is one of."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of the measurements."""

    rows: tuple[int, ...]
    context: int
    contexts: tuple[int, ...]
    """Longer ones, for decode steps on history that was really read."""
    prompts: tuple[int, ...]
    step_tokens: int
    max_len: int
    turns: tuple[int, ...] = ()
    """Prompts that are read once, asked again and followed by a turn."""
    history: int = 2**20
    """Tokens of longer contexts at a time."""


def parts(s: Shapes, only: tuple[str, ...]) -> Iterator[Part]:
    """In the order in which a run that has little time is best spent."""
    longest = s.prompts[-1]
    news = [n for n in NEW if longest + n < s.max_len]
    every = [
        Part(
            "first",
            lambda d: first(d, min(1000, longest)),
            lambda x: x.prompt(min(1000, longest), s.step_tokens),
            "second_ms",
        ),
        *(_decode("decode", n, s.context) for n in s.rows[:2]),
        _prompt(longest, s.step_tokens),
        *(_cached(longest, new, s.step_tokens) for new in news[:3]),
        *(_turns(s, n) for n in s.turns),
        _beside(s, 4 * longest),
        *(_decode("decode", n, s.context) for n in s.rows[2:]),
        *(_decode("long", rows, n) for n in s.contexts for rows in sorted(s.rows) if rows * n <= s.history),
        *(_prompt(n, s.step_tokens) for n in reversed(s.prompts[:-1])),
        *(_cached(longest, new, s.step_tokens) for new in news[3:]),
    ]
    for part in every:
        if part.name in only:
            yield part


def _decode(name: str, rows: int, context: int) -> Part:
    return Part(name, lambda d: decode(d, rows, context), lambda x: x.decode(rows, context), "wall_ms")


def _prompt(tokens: int, step: int) -> Part:
    return Part("prefill", lambda d: cold(d, tokens), lambda x: x.prompt(tokens, step), "ttft_ms")


def _cached(tokens: int, new: int, step: int) -> Part:
    return Part(
        "cached", lambda d: cached(d, tokens, new), lambda x: x.prompt(new, step, start=tokens), "ttft_ms"
    )


def _turns(s: Shapes, tokens: int) -> Part:
    rows, behind = min(8, max(s.rows)), min(32_768, s.max_len - tokens - 500)
    return Part(
        "turns",
        lambda d: turns(d, tokens, rows=rows, behind=behind),
        lambda x: x.prompt(tokens, s.step_tokens),
        "ttft_ms",
    )


def _beside(s: Shapes, tokens: int) -> Part:
    rows, tokens = min(8, max(s.rows)), min(tokens, s.max_len - 2)
    context = min(4000, s.context * 4)
    return Part(
        "beside", lambda d: beside(d, tokens, rows, context), lambda x: x.decode(rows, context), "alone_ms"
    )
