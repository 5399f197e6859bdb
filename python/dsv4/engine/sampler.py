"""Logits to tokens. A row's token depends on its logits, its own request and its place in the output, never on the batch.

Order: logit bias, penalties, min_tokens, temperature, min_p, top_k, top_p, then one draw. Log-probabilities are those of
the model's own logits, before any of that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsv4.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token with its log-probability and rank (1 = best), both 0 unless asked for, and the best alternatives."""

    token: int
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


class PoisonedLogits(Exception):
    """The model gave logits that are not finite for a request; only this request fails."""


@dataclass(slots=True)
class SamplingState:
    """What sampling needs to know of a request. `output` holds every sampled token, those not yet committed included."""

    params: SamplingParams
    prompt: Sequence[int]
    eos_ids: frozenset[int]
    seed: int
    output: list[int] = field(default_factory=list)
    _counts: Counter[int] = field(default_factory=Counter)

    def truncate(self, length: int) -> None:
        """Forgets tokens from `length` on: they were sampled by a step that did not count."""
        for token in self.output[length:]:
            self._counts[token] -= 1
        del self.output[length:]

    def append(self, token: int) -> None:
        self.output.append(token)
        self._counts[token] += 1

    def uniform(self) -> float:
        """The draw for the next token, in [0, 1): a counter-based generator keyed by seed and place in the output."""
        bits = np.random.Philox(key=self.seed % 2**128, counter=len(self.output))
        return float(np.random.Generator(bits).random())

    def adjust(self, logits: Tensor) -> Tensor:
        """Bias, penalties and min_tokens applied to float32 [V]; a copy where anything changes."""
        p, counts = self.params, {t: n for t, n in self._counts.items() if n > 0}
        penal = p.presence_penalty or p.frequency_penalty
        early = len(self.output) < p.min_tokens
        if not (p.logit_bias or penal or p.repetition_penalty != 1 or early):
            return logits
        logits = logits.clone()
        known = range(len(logits))
        for token, bias in p.logit_bias.items():
            if token in known:
                logits[token] += bias
        if p.repetition_penalty != 1:
            at = torch.tensor(sorted({*self.prompt, *counts}), dtype=torch.int64)
            seen = logits[at]
            logits[at] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        if penal and counts:
            at = torch.tensor(list(counts), dtype=torch.int64)
            times = torch.tensor(list(counts.values()), dtype=torch.float32)
            logits[at] -= p.presence_penalty + p.frequency_penalty * times
        if early:
            ends = [t for t in (*self.eos_ids, *p.stop_token_ids) if t in known]
            logits[ends] = -math.inf
        return logits


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled | PoisonedLogits]:
    """One token for each row of float32 [S, V]. Each state takes its token in."""
    return [_sample_row(row, state) for row, state in zip(logits.cpu(), states, strict=True)]


def _sample_row(logits: Tensor, state: SamplingState) -> Sampled | PoisonedLogits:
    if not torch.isfinite(logits).all():
        return PoisonedLogits("the model gave logits that are not finite")
    adjusted = state.adjust(logits)
    greedy = state.params.temperature == 0
    token = int(adjusted.argmax()) if greedy else _draw(adjusted, state)  # argmax: the first of equals
    state.append(token)
    if state.params.logprobs is None:
        return Sampled(token)
    return judge(logits, token, state.params.logprobs)


def _draw(logits: Tensor, state: SamplingState) -> int:
    """Inverse transform over the kept tokens in order of id, in float64."""
    p = state.params
    probs = torch.softmax(logits.double() / p.temperature, dim=-1)
    if p.min_p > 0:
        probs = torch.where(probs >= p.min_p * probs.max(), probs, 0)
    top_k = p.top_k if 0 < p.top_k < len(probs) else 0
    if top_k or p.top_p < 1:
        ordered, ids = probs.sort(descending=True, stable=True)  # equals by lowest id
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if top_k:
            keep[top_k:] = False
        if p.top_p < 1:
            kept = torch.where(keep, ordered, 0)
            before = kept.cumsum(0) - kept
            keep &= before < p.top_p * kept.sum()
        probs = torch.zeros_like(probs).scatter(0, ids[keep], ordered[keep])
    cumulative = probs.cumsum(0)
    place = torch.searchsorted(cumulative, state.uniform() * cumulative[-1], right=True)
    return min(int(place), int(probs.nonzero()[-1]))


def judge(logits: Tensor, token: int, top: int) -> Sampled:
    """Log-probability, rank and the `top` best alternatives of a token under float32 [V]; equals by lowest id."""
    logprobs = torch.log_softmax(logits, dim=-1)
    rank = int((logits > logits[token]).sum()) + 1
    best: Iterable[int] = ()
    if top:
        least = logprobs.topk(min(top, len(logprobs))).values[-1]
        candidates = (logprobs >= least).nonzero().flatten()
        best = candidates[logprobs[candidates].sort(descending=True, stable=True).indices][:top].tolist()
    return Sampled(token, float(logprobs[token]), rank, tuple((i, float(logprobs[i])) for i in best))


def logprobs_of(logits: Tensor, targets: Sequence[int], top: int) -> list[Sampled]:
    """`judge` for each row of [N, V] and its target: the log-probabilities of a given text."""
    return [judge(row, target, top) for row, target in zip(logits.cpu(), targets, strict=True)]
