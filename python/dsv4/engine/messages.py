"""What the two processes of an engine say to each other: msgpack of the structs below, an array each, without field names.

A prompt is not part of its message: it follows it as raw int32 (see link.py). What a step brought is one message for all
requests, whose tokens are two columns, keys and ids.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from dsv4.config import EngineConfig
from dsv4.engine.request import Sampled, Timing
from dsv4.engine.routing import Routing
from dsv4.sampling import SamplingParams


class _Message(msgspec.Struct, array_like=True, tag=True):
    """First comes the name of its class."""


class Begin(_Message):
    """The first message to an engine."""

    config: EngineConfig
    eos_ids: list[int]
    log_level: int


class Submit(_Message):
    """A request, with its prompt."""

    key: int
    """Its number: a live request has its own, and a parent's is below its own."""
    params: SamplingParams
    """With `max_tokens`."""
    routing: Routing
    parent: int | None
    """The request whose state it takes over, if that is live."""
    submitted: float
    """When, on the machine's monotonic clock."""


class Abort(_Message):
    """Requests that nobody waits for."""

    keys: list[int]


class Stop(_Message):
    """Requests whose answer is whole: they end as if the model had ended."""

    keys: list[int]


class Ask(_Message):
    """A call of the core, `what(*arguments)`; with a prompt that is the last argument."""

    ticket: int
    what: str
    arguments: list[Any]


class Quit(_Message):
    """Ends the engine after the step at hand."""


ToEngine = Begin | Submit | Abort | Stop | Ask | Quit


class Log(_Message):
    """A line of log."""

    logger: str
    level: int
    text: str
    traceback: str | None


class Loading(_Message):
    """How far the start is: see `warmup.Progress`."""

    done: int
    total: int
    name: str
    stage: str


class Counts(_Message):
    """Statistics of the core, and those of tenants by number (see `Core.stats` and `Core.tenants`)."""

    stats: dict[str, int]
    tenants: dict[int, dict[str, float]] | None


class Ready(_Message):
    """The engine takes requests: every setting resolved, and what it made of them, as lines to print."""

    config: EngineConfig
    max_model_len: int
    about: list[str]
    counts: Counts


class Alive(_Message):
    """Rank 0 of several is, whatever its steps do."""


class Failed(_Message):
    """It could not start, or cannot go on."""

    kind: str
    """Name of the error."""
    text: str


class Refused(_Message):
    """A request that the core did not take; the fields are RequestError's."""

    key: int
    message: str
    param: str | None
    code: str
    status: int


class Answered(_Message):
    """The value of an Ask, or the error: name of its class and text."""

    ticket: int
    value: Any
    error: tuple[str, str] | None


class End(_Message):
    """A request has ended."""

    key: int
    reason: str
    stop_token: int
    """-1 when no token ended it."""
    error: str | None
    error_field: str | None
    """As in `RequestOutput`."""
    explanation: dict[str, Any]
    timing: Timing


class News(_Message):
    """What a step brought, or a part of one; empty ones are a sign of life."""

    started: list[tuple[int, int, int]] = []
    """(key, prompt tokens, of them cached): computed from now on."""
    prefilled: list[tuple[int, int]] = []
    """(key, prompt tokens computed so far)."""
    keys: bytes = b""
    """int64, and `tokens` int32: the new tokens of all requests, those of one in order."""
    tokens: bytes = b""
    judged: list[tuple[int, Sampled]] = []
    """By place in `tokens`, log-probabilities that were asked for, in order."""
    prompts: list[tuple[int, list[Sampled]]] = []
    """(key, log-probabilities of its prompt, from where the last ones ended)."""
    ends: list[End] = []
    taken: int = 0
    """Messages that the engine has carried out."""
    idle: bool = False
    """It has nothing to do."""
    doubt: str | None = None
    """Steps fail one after the other, and why the last one did."""
    counts: Counts | None = None

    @property
    def empty(self) -> bool:
        """Whether it tells nothing of any request."""
        return not (self.started or self.prefilled or self.keys or self.prompts or self.ends)

    def samples(self) -> zip[tuple[int, int]]:
        """(key, token), in order."""
        keys, tokens = np.frombuffer(self.keys, np.int64), np.frombuffer(self.tokens, np.int32)
        return zip(keys.tolist(), tokens.tolist(), strict=True)


FromEngine = Log | Alive | Loading | Ready | Failed | Refused | Answered | News

encode = msgspec.msgpack.Encoder().encode
to_engine = msgspec.msgpack.Decoder(ToEngine).decode
from_engine = msgspec.msgpack.Decoder(FromEngine).decode
