"""From sampled ids to what the caller sees: text, log-probabilities, stop strings, the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4.engine.request import FINISH_REASONS, EngineRequest, RequestOutput, Usage
from dsv4.engine.sampler import Sampled
from dsv4.text.output import Piece


@dataclass(slots=True)
class Delta:
    """What one step brought for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Sampled] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    prefilled: int | None = None


def push_token(request: EngineRequest, delta: Delta, sampled: Sampled) -> bool:
    """Adds a token; returns True when the answer is whole with it and the request should end."""
    request.output.append(sampled.token)
    delta.token_ids.append(sampled.token)
    if request.params.logprobs is not None:
        delta.logprobs.append(sampled)
    ends = sampled.token in request.eos_ids and not request.params.ignore_eos
    ends = ends or sampled.token in request.params.stop_token_ids
    if request.stream is None:
        return False
    delta.pieces += request.stream.push(sampled.token, ends=ends)
    return request.ended


def as_output(request: EngineRequest, delta: Delta) -> RequestOutput:
    """A delta of a request that goes on."""
    return RequestOutput(
        request.request_id,
        delta.token_ids,
        delta.pieces,
        logprobs=delta.logprobs if request.params.logprobs is not None else None,
        prefilled=delta.prefilled,
    )


def as_final(
    request: EngineRequest, delta: Delta, reason: int, stop_token: int, explanation: dict
) -> RequestOutput:
    """The last output. `reason` as in the FINISHED event; `stop_token` is -1 when no token ended it."""
    if request.stream is not None:
        delta.pieces += request.stream.finish(cut=FINISH_REASONS[reason] != "stop" and not request.ended)
    stopped = (
        request.stop_string if request.stop_string is not None else stop_token if stop_token >= 0 else None
    )
    eos = isinstance(stopped, int) and stopped in request.eos_ids
    return RequestOutput(
        request.request_id,
        delta.token_ids,
        delta.pieces,
        logprobs=delta.logprobs if request.params.logprobs is not None else None,
        prompt_logprobs=request.prompt_logprobs if request.wants_prompt_logprobs else None,
        finished=True,
        finish_reason="error" if request.error else "stop" if request.ended else FINISH_REASONS[reason],
        stop_reason=None if eos else stopped,
        error=request.error,
        usage=Usage(
            len(request.prompt),
            len(request.output),
            explanation["cached_tokens"],
            explanation,
            request.stream.reasoning_tokens if request.stream is not None else 0,
            request.timing(),
        ),
    )
