"""Sampling parameters out of a request body. Ranges are those of `SamplingParams`, which has the last
word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4.api.fields import Fields, refuse
from dsv4.api.http import Call
from dsv4.errors import RequestError
from dsv4.sampling import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

MAX_CHOICES = 128
"""Largest `n`."""

_INTEGERS = ("top_k", "min_tokens", "seed")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


def sampling_params(
    fields: Fields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    stops: str = "stop",
) -> SamplingParams:
    """The request's parameters. `defaults` hold where the body says nothing; `stops` is the field of the stop strings. Raises
    RequestError naming the field."""
    values: dict[str, Any] = dict(defaults or {})
    for name in (*_INTEGERS, *_NUMBERS):
        value = fields.get(name)
        if value is None:
            continue
        if type(value) not in (int, float):
            raise refuse(name, value, "a number")
        # A number beyond 64 bits is read as a float, which is not what was sent.
        whole = (
            name in _INTEGERS
            and float(value).is_integer()
            and not (type(value) is float and abs(value) >= 2**63)
        )
        values[name] = int(value) if whole else value
    for name in _FLAGS:
        if fields.get(name) is not None:
            values[name] = fields.boolean(name)
    values |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    values |= {
        "stop": _stops(fields, stops),
        "stop_token_ids": tuple(fields.items("stop_token_ids", int, 1024)),
        "logit_bias": _logit_bias(fields),
    }
    try:
        return SamplingParams(**values)
    except ValueError as e:
        raise RequestError(str(e), str(e).split(" ", 1)[0], "invalid_value", 400) from None


def max_tokens_of(fields: Fields, default: int | None) -> int | None:
    """`max_completion_tokens`, else `max_tokens`, else the default; None means what the context holds."""
    given = [fields.integer(name, 0, 2**31 - 1) for name in ("max_completion_tokens", "max_tokens")]
    return next((value for value in given if value is not None), default)


def choices_of(fields: Fields) -> int:
    """`n`. `best_of` is the same thing here or an error, as nothing is generated to be thrown away."""
    n = fields.integer("n", 1, MAX_CHOICES, 1) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, n):
        raise refuse("best_of", best_of, f"the value of n ({n}), or leave it out")
    return n


def check_queue(prompts: int, n: int, most: int) -> None:
    """Raises RequestError for more answers than the queue ever holds: to try again later would be no use."""
    if prompts * n > most:
        asked = f"{prompts} prompts times n {n}" if prompts > 1 else f"the choices of n {n}"
        text = f"{asked} are more than the queue holds; at most {most}"
        raise RequestError(text, "n" if n > 1 else "prompt", "invalid_value", 400)


def include_usage_of(fields: Fields) -> tuple[bool, bool]:
    """`stream_options`: (whether the usage comes at the end, whether with every chunk too, as vLLM has it)."""
    options = fields.nested("stream_options")
    at_end, always = options.boolean("include_usage"), options.boolean("continuous_usage_stats")
    return at_end, at_end and always


def answer_id_of(call: Call) -> str:
    """The answer's id after its prefix: `request_id` of vLLM, `rid` of SGLang, else the id of the request."""
    given = [call.fields.text(name, longest=128) for name in ("request_id", "rid")]
    return next(filter(None, given), call.request_id)


def _stops(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.get(name)
    found = [value] if isinstance(value, str) and name == "stop" else fields.items(name, str, MAX_STOPS)
    for i, text in enumerate(found):
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            where = f"{name}[{i}]" if isinstance(value, list) else name
            raise refuse(where, text, f"text of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(found)


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias: dict[int, float] = {}
    for token, value in fields.nested("logit_bias").body.items():
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            raise refuse("logit_bias", token, "token ids as keys")
        bias[int(token)] = value
    return bias
