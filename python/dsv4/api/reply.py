"""One choice of an answer: outputs of the engine put together, the same for all dialects, whole or as they come."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.api.strict_tools import StrictTools
from dsv4.engine.request import RequestOutput, Sampled, Started, Usage
from dsv4.text.blocks import Block, Blocks
from dsv4.text.output import Piece, ToolStart


@dataclass(frozen=True, slots=True)
class News:
    """A piece, and the block it belongs to: its number, from 0, and whether it begins with this piece. The block before
    it is over then."""

    piece: Piece
    number: int
    block: Block
    begins: bool


class Reply:
    """Reads outputs; what is known so far stands in its attributes."""

    def __init__(
        self,
        strict: StrictTools | None = None,
        *,
        call_prefix: str = "call_",
        keep: Callable[[Reply], None] | None = None,
    ) -> None:
        """`strict`: the request's strict tools, whose calls are checked. `call_prefix`: how ids of calls begin. `keep` gets the
        reply when it is whole."""
        self._strict, self._call_prefix, self.keep = strict, call_prefix, keep
        self.strict_error: str | None = None
        """What of the calls does not fit the schema of a strict tool. They are not called finished then."""
        self.blocks = Blocks()
        self.call_ids: list[str] = []
        """By number of the call."""
        self.token_ids: list[int] = []
        self.logprobs: list[Sampled] = []
        self.prompt_logprobs: list[Sampled | None] = []
        self.started: Started | None = None
        self.finish_reason: str | None = None
        """`stop`, `length`, or `tool_calls`: the model ended by itself, and what it wants is that the calls, all of which are
        whole, are made."""
        self.stop_reason: str | int | None = None
        """The stop string or token that ended it."""
        self.usage: Usage | None = None

    def read(self, output: RequestOutput) -> list[News]:
        """What an output brings, in order."""
        self.started = output.started or self.started
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs += output.prompt_logprobs or ()
        news = [self._add(piece) for piece in output.pieces]
        if output.finished:
            ended = output.finish_reason == "stop"
            called = ended and bool(self.call_ids)
            if called and self._strict is not None:
                self.strict_error = self._strict.fault((c.name, c.arguments) for c in self.blocks.calls)
            self.finish_reason = "tool_calls" if called and not self.strict_error else output.finish_reason
            self.stop_reason, self.usage = output.stop_reason, output.usage
            if self.keep is not None:
                self.keep(self)
        return news

    def _add(self, piece: Piece) -> News:
        begins = self.blocks.add(piece)
        if isinstance(piece, ToolStart):
            self.call_ids.append(f"{self._call_prefix}{uuid.uuid4().hex[:24]}")
        return News(piece, len(self.blocks.all) - 1, self.blocks.all[-1], begins)
