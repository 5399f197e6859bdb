"""What the engine keeps for a request, and what its caller gets back. No torch: both processes import it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4.errors import RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.output import Content, Piece

if TYPE_CHECKING:  # the server's process makes no masks
    from dsv4.engine.masks import Constraint

FINISH_REASONS = {1: "stop", 2: "length", 3: "abort"}
"""By the number of the core's FINISHED event."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token with its log-probability and rank (1 = best), both 0 unless asked for, and the best alternatives."""

    token: int
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a request by what it did: waited for its first step, computed its prompt, generated."""

    queued: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. `explanation` says what of its prefix was reused and why not more (see `Core.explain`)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    explanation: dict[str, Any]
    reasoning_tokens: int = 0
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A request that begins to be computed: tokens of its prompt, and how many of them were cached."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request after one step: tokens and pieces are what came since the last output."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    """What the tokens say: content alone, or in a chat reasoning and tool calls too."""
    logprobs: list[Sampled] | None = None
    """One entry per token of `token_ids`, when the request asked for log-probabilities."""
    prompt_logprobs: list[Sampled | None] | None = None
    """One entry per prompt token (None for the first), once, when asked for."""
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the request."""
    error: str | None = None
    error_field: str | None = None
    """The field that asked for a form, where the form is what failed."""
    usage: Usage | None = None
    prefilled: int | None = None
    """Prompt tokens computed so far, while the prompt is still being read."""
    started: Started | None = None
    """Once, in an output of its own before the first token."""

    @property
    def text(self) -> str:
        """The content among the pieces."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Content))

    @property
    def failure(self) -> RequestError | None:
        """What a request that failed raises: a form that cannot be followed is the request's own, and would fail as it is again."""
        if self.finish_reason != "error":
            return None
        if self.error_field is not None:
            return RequestError(self.error or "", self.error_field, "form_failed", 400)
        return RequestError(self.error or "the generation failed", None, "generation_failed", 500)


class EngineRequest:
    """A live request beside the core. Nothing of it changes with each token, unless its sampling needs the tokens back."""

    def __init__(
        self, key: int, prompt: np.ndarray, params: SamplingParams, *, seed: int, ends: tuple[int, ...]
    ) -> None:
        """`ends`: token ids that end it."""
        self.key, self.prompt, self.params, self.seed, self.ends = key, prompt, params, seed, ends
        self.output: list[int] | None = [] if params.looks_back else None
        """Tokens so far, where sampling has to know them after a preemption."""
        self.constraint: Constraint | None = None
        """What its grammar says of the next token."""
        self.judged = 1
        """Prompt tokens whose log-probabilities were told, the first one, which has none, included."""
        self.error: str | None = None
        self.error_field: str | None = None
        self.submitted = time.monotonic()
        self.begun = self.first = 0.0
        """Times of the plan of its first step and of its first token; 0 before that."""

    def timing(self) -> Timing:
        """At its end."""
        now = time.monotonic()
        begun = self.begun or now
        first = self.first or now
        return Timing(begun - self.submitted, first - begun, now - first)
