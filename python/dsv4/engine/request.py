"""What the engine keeps for a request, and what its caller gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.engine.sampler import Sampled, SamplingState
from dsv4.sampling import SamplingParams
from dsv4.text.detokenizer import Detokenizer
from dsv4.text.stop import StopStrings

FINISH_REASONS = {1: "stop", 2: "length", 3: "abort", 4: "error"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. `explanation` says what of its prefix was reused and why not more (see `Core.explain`)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    explanation: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request after one step: tokens and text are what came since the last output."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Sampled] | None = None
    """One entry per token of `token_ids`, when the request asked for log-probabilities."""
    prompt_logprobs: list[Sampled | None] | None = None
    """One entry per prompt token (None for the first), once, when asked for."""
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the request."""
    error: str | None = None
    usage: Usage | None = None
    prefilled: int | None = None
    """Prompt tokens computed so far, while the prompt is still being read."""


class EngineRequest:
    """A live request on the engine thread."""

    def __init__(
        self,
        key: int,
        request_id: str,
        prompt: np.ndarray,
        params: SamplingParams,
        sampling: SamplingState,
        detokenizer: Detokenizer | None,
        deliver: Callable[[RequestOutput], None],
    ) -> None:
        self.key, self.request_id = key, request_id
        self.prompt, self.params, self.sampling = prompt, params, sampling
        self.detokenizer = detokenizer
        self.stops = (
            StopStrings(params.stop, include=params.include_stop_str_in_output) if params.stop else None
        )
        self.deliver = deliver
        self.output: list[int] = []
        self.prompt_logprobs: list[Sampled | None] = [None]
        self.stop_string: str | None = None
        self.error: str | None = None

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None
