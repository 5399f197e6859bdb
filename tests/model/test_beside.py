"""Which stream waits for which where parts run beside each other. Streams are stand-ins: what is launched is written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dsv4.model import beside as module
from dsv4.model.beside import LANES, beside

Log = list[tuple[str, str]]


class Stream:
    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, f"waits for {other.name}"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Log, Any]]:
    """What happened, in order, and what launches on the current stream."""
    log: Log = []
    current = [Stream("main", log)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    token = module._open.set(tuple(Stream(f"lane {i}", log) for i in range(LANES)))  # type: ignore[arg-type]
    yield log, lambda what: log.append((current[-1].name, what)) or what
    module._open.reset(token)


def test_a_part_begins_after_what_was_launched_and_is_waited_for(launched: tuple[Log, Any]) -> None:
    log, launch = launched
    join = beside(lambda: launch("part"), 1)
    launch("meanwhile")
    assert join() == "part"
    assert log == [
        ("lane 1", "waits for main"),
        ("lane 1", "part"),
        ("main", "meanwhile"),
        ("main", "waits for lane 1"),
    ]


def test_a_part_that_joins_another_waits_on_its_own_stream(launched: tuple[Log, Any]) -> None:
    """The one that launched both goes on meanwhile."""
    log, launch = launched
    first = beside(lambda: launch("first"), 0)
    second = beside(lambda: (launch("second"), first()), 1)
    launch("meanwhile")
    assert second() == ("second", "first")
    assert log[2:] == [
        ("lane 1", "waits for main"),
        ("lane 1", "second"),
        ("lane 1", "waits for lane 0"),
        ("main", "meanwhile"),
        ("main", "waits for lane 1"),
    ]


def test_without_lanes_everything_runs_in_turn() -> None:
    said: list[str] = []
    join = beside(lambda: said.append("part"), 0)
    said.append("after")
    join()
    assert said == ["part", "after"]
