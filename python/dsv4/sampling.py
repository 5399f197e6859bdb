"""What a request asks of the sampler and of its end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from dsv4.errors import show
from dsv4.quantities import nearest_number

_INT_RANGES = {
    "top_k": (-1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "max_tokens": (0, 2**31 - 1),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "seed": (-(2**63), 2**64 - 1),
}
_FLOAT_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
RANGES: Mapping[str, tuple[float, float]] = {**_INT_RANGES, **_FLOAT_RANGES}
"""The least and the most of each number; whole numbers where both are."""

MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES = 16, 1024, 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that an answer must have, from its first token on, as llguidance reads it: Lark, or a JSON list of grammars."""

    text: str
    field: str
    """Of the request, for errors: what asked for it."""
    chat: bool = False
    """The answer is read as a chat's, so it spells no markup in letters."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and meanings are vLLM's. `max_tokens=None` means up to the context's end; `logprobs=n` returns the n best
    alternatives beside each token. Raises ValueError with one line naming field, value and limit."""

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_stops()
        self._check_bias()
        for name, (low, high) in _INT_RANGES.items():
            value = getattr(self, name)
            if value is None and name not in ("top_k", "min_tokens"):
                continue
            if not is_whole(value):
                raise ValueError(f"{name} is {show(value)}; it must be a whole number from {low} to {high}")
            if not low <= value <= high:
                near = nearest_number(value, low, high)
                raise ValueError(f"{name} is {value}; it must be from {low} to {high}{near}")
            self._set(name, int(value))
        for name, (low, high) in _FLOAT_RANGES.items():
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"{name} is {show(value)}; it must be a number from {low:g} to {high:g}")
            if not low <= value <= high:
                near = (
                    "" if name == "top_p" and value < low else nearest_number(value, low, high)
                )  # 0 is none
                raise ValueError(f"{name} is {value:g}; it must be from {low:g} to {high:g}{near}")
            self._set(name, float(value))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {show(getattr(self, name))}; it must be true or false")
        if self.top_p == 0:
            raise ValueError("top_p is 0; it must be above 0, and 1 turns it off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens ({self.max_tokens})"
            )
        if not isinstance(self.grammar, (Grammar, type(None))):
            raise ValueError(f"grammar is {show(self.grammar)}; it must be a Grammar(...)")

    def _set(self, name: str, value: Any) -> None:
        """Puts a number of numpy's in Python's own type, as only that crosses to the engine's process."""
        object.__setattr__(self, name, value)

    @property
    def looks_back(self) -> bool:
        """Whether a token depends on which ones were generated before, or how many."""
        penal = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penal or self.min_tokens or self.grammar is not None)

    def _check_stops(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else self._listed("stop"))
        self._set("stop_token_ids", self._listed("stop_token_ids"))
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} strings; the limit is {MAX_STOPS}")
        for s in self.stop:
            if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_LENGTH:
                raise ValueError(
                    f"stop has {show(s)}; each entry must be text of 1 to {MAX_STOP_LENGTH} characters"
                )
            if not is_unicode(s):
                raise ValueError(
                    f"stop has {show(s)}, half of a surrogate pair; each entry must be Unicode text"
                )
        for t in self.stop_token_ids:
            if not is_whole(t) or not 0 <= t < 2**31:
                raise ValueError(f"stop_token_ids has {show(t)}; each entry must be a token id")
        self._set("stop_token_ids", tuple(map(int, self.stop_token_ids)))

    def _listed(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
            raise ValueError(f"{name} is {show(value)}; it must be a list")
        return tuple(value)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias is {show(self.logit_bias)}; it must be a dict of token ids and numbers"
            )
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_BIASES}")
        for token, bias in self.logit_bias.items():
            if not is_whole(token) or token < 0:
                raise ValueError(f"logit_bias has the key {show(token)}; keys are token ids")
            if not is_number(bias) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token} is {show(bias)}; it must be from -100 to 100")
        self._set("logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})


def is_whole(value: object) -> bool:
    """A whole number, numpy's too; a boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite number, numpy's too; a boolean is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
