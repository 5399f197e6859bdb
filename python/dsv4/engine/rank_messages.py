"""What rank 0 and another rank of an engine say to each other: msgpack of the structs below, as in `messages.py`.

A step's plan is not part of its message: it follows it as raw int32 (`StepPlan.packed`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from dsv4.config import EngineConfig
from dsv4.engine.messages import Failed, Log


class _Message(msgspec.Struct, array_like=True, tag=True):
    """First comes the name of its class."""


class Hello(_Message):
    """The first message to a rank."""

    rank: int
    ranks: int
    config: EngineConfig
    """Every setting resolved."""
    log_level: int


class Load(_Message):
    """Read the weights."""

    packed: bool


class Serve(_Message):
    """Meet the other ranks, and take steps."""

    meeting: str
    """See `meeting.py`."""
    pages: int
    max_len: int
    schema: dict[str, Any]
    """Of plans."""
    warm_up: int
    """Tokens of the prompt to warm up with; 0: none."""


class Step(_Message):
    """Take a step, whose plan follows."""

    judged: list[tuple[int, int]]
    """(row, tokens) of rows whose prompts get log-probabilities."""


class Meet(_Message):
    """A step was given up: leave the group and meet again, for so many times now."""

    time: int


class Ping(_Message):
    """Answer at once, whatever you do."""


class ShowStacks(_Message):
    """Tell what your threads do, whatever you do."""


class Quit(_Message):
    """End."""


ToRank = Hello | Load | Serve | Step | Meet | Ping | ShowStacks | Quit


class Here(_Message):
    """The rank has its device."""

    free: int
    """Bytes of memory that its engine may use (see `memory.usable_memory`)."""


class Loaded(_Message):
    """It has its weights."""


class Serves(_Message):
    """It takes steps."""


class Done(_Message):
    """A step is launched, or was given up."""

    us: float
    """Microseconds that it took."""
    error: str | None
    """Why it was given up; empty where another rank is the reason."""


class Met(_Message):
    """It has met the others again."""


class Pong(_Message):
    """It is alive."""

    said: int
    """Collectives that it has begun."""
    bytes: int
    """Memory that it holds: of its GPU, or of the host."""


class Stacks(_Message):
    """What its threads do."""

    text: str


FromRank = Log | Failed | Here | Loaded | Serves | Done | Met | Pong | Stacks

encode = msgspec.msgpack.Encoder().encode
to_rank = msgspec.msgpack.Decoder(ToRank).decode
from_rank = msgspec.msgpack.Decoder(FromRank).decode
