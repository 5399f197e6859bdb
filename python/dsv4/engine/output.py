"""From sampled ids to what the caller sees: text, log-probabilities, stop strings, the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4.engine.request import FINISH_REASONS, EngineRequest, RequestOutput, Usage
from dsv4.engine.sampler import Sampled


@dataclass(slots=True)
class Delta:
    """What one step brought for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Sampled] = field(default_factory=list)
    text: str = ""
    prefilled: int | None = None


def push_token(request: EngineRequest, delta: Delta, sampled: Sampled) -> bool:
    """Adds a token; returns True when a stop string is complete and the request should end."""
    request.output.append(sampled.token)
    delta.token_ids.append(sampled.token)
    if request.params.logprobs is not None:
        delta.logprobs.append(sampled)
    ends = sampled.token in request.sampling.eos_ids and not request.params.ignore_eos
    ends = ends or sampled.token in request.params.stop_token_ids
    if request.detokenizer is None or ends:
        return False
    return _push_text(request, delta, request.detokenizer.push(sampled.token))


def _push_text(request: EngineRequest, delta: Delta, text: str) -> bool:
    if request.stops is None:
        delta.text += text
        return False
    # min_tokens holds for stop strings as well: one that completes too early is plain text.
    delta.text += request.stops.push(text, armed=len(request.output) >= request.params.min_tokens)
    request.stop_string = request.stops.matched
    return request.stop_string is not None


def flush_text(request: EngineRequest, delta: Delta) -> None:
    """Text held back for an unfinished character or a possible stop string, at the end of the request."""
    if request.detokenizer is None or request.stop_string is not None:
        return
    if not _push_text(request, delta, request.detokenizer.flush()) and request.stops is not None:
        delta.text += request.stops.flush()


def as_output(request: EngineRequest, delta: Delta) -> RequestOutput:
    """A delta of a request that goes on."""
    return RequestOutput(
        request.request_id,
        delta.token_ids,
        delta.text,
        logprobs=delta.logprobs if request.params.logprobs is not None else None,
        prefilled=delta.prefilled,
    )


def as_final(
    request: EngineRequest, delta: Delta, reason: int, stop_token: int, explanation: dict
) -> RequestOutput:
    """The last output. `reason` as in the FINISHED event; `stop_token` is -1 when no token ended it."""
    flush_text(request, delta)
    stopped = (
        request.stop_string if request.stop_string is not None else stop_token if stop_token >= 0 else None
    )
    eos = isinstance(stopped, int) and stopped in request.sampling.eos_ids
    return RequestOutput(
        request.request_id,
        delta.token_ids,
        delta.text,
        logprobs=delta.logprobs if request.params.logprobs is not None else None,
        prompt_logprobs=request.prompt_logprobs if request.wants_prompt_logprobs else None,
        finished=True,
        finish_reason="error"
        if request.error
        else "stop"
        if request.stop_string is not None
        else FINISH_REASONS[reason],
        stop_reason=None if eos else stopped,
        error=request.error,
        usage=Usage(len(request.prompt), len(request.output), explanation["cached_tokens"], explanation),
    )
