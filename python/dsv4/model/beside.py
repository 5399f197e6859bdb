"""Parts of a decode step that do not wait for each other, on streams of their own. A decode step of few rows is a chain of launches that
each fill a part of the GPU; a CUDA graph keeps what its capture saw of streams. Elsewhere, where launches take the host longer than the GPU,
and on a CPU, everything runs in turn.

A part may read what lives until it is joined, and each part begins after all that was launched before it on the stream that it leaves. So
memory that a stream frees is never written by another while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")

LANES = 3
"""Streams beside the one that launches."""

_open: ContextVar[tuple[torch.cuda.Stream, ...]] = ContextVar("streams beside", default=())


@cache
def _streams(index: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(index) for _ in range(LANES))


@contextmanager
def lanes(device: torch.device) -> Iterator[None]:
    """Within, `beside` takes streams of its own, on a GPU."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    token = _open.set(_streams(index))
    try:
        yield
    finally:
        _open.reset(token)


def beside(part: Callable[[], Result], lane: int | None) -> Callable[[], Result]:
    """Launches `part` on the stream of a lane, which has no other part that is not joined, or for None on the stream that calls. The call
    that is given back joins: what is launched after it on the stream that called comes after the part, whose result it gives. A part may
    join others; who joins it has joined them too."""
    side_by_side = _open.get()
    if not side_by_side or lane is None:
        result = part()
        return lambda: result
    side = side_by_side[lane]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = part()

    def join() -> Result:
        torch.cuda.current_stream().wait_stream(side)
        return result

    return join
