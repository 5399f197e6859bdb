"""Logits to tokens. A row's token depends on its logits, its own request and its place in the output, never on the batch.

Order: logit bias, penalties, min_tokens, temperature, min_p, top_k, top_p, then one draw (the op `sample`).
Log-probabilities are those of the model's own logits, before any of that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

# `np.unique` loads it when first used, which would be in a step, where an import may fail for want of a file.
import numpy.ma
import torch
from torch import Tensor

from dsv4.ops.reference import sample as reference
from dsv4.ops.registry import Op
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


Edits = tuple[np.ndarray, np.ndarray]
"""Tokens int64 [n] and, for each, what happens to its logit, float32 [n, 3]: an addend, the factor of the repetition
penalty, and a subtrahend, in this order."""


@dataclass(slots=True)
class SamplingState:
    """What sampling needs to know of a request. `output` holds every sampled token, those not yet committed included."""

    params: SamplingParams
    prompt: np.ndarray
    """int32 [tokens]."""
    eos_ids: frozenset[int]
    seed: int
    output: list[int] = field(default_factory=list)
    _counts: Counter[int] = field(default_factory=Counter)
    _prompt: np.ndarray | None = None
    """Distinct tokens of the prompt, once they are needed."""

    def truncate(self, length: int) -> None:
        """Forgets tokens from `length` on: they were sampled by a step that did not count."""
        for token in self.output[length:]:
            self._counts[token] -= 1
        del self.output[length:]

    def append(self, token: int) -> None:
        self.output.append(token)
        self._counts[token] += 1

    @property
    def position(self) -> int:
        """Of the token that the next one follows."""
        return len(self.prompt) + len(self.output) - 1

    def edits(self, vocab: int) -> Edits | None:
        """Bias, penalties and min_tokens as changes of single logits, or None; ids that a vocabulary of `vocab` lacks are
        left out."""
        p = self.params
        early = len(self.output) < p.min_tokens
        penal = p.presence_penalty or p.frequency_penalty
        if not (p.logit_bias or penal or p.repetition_penalty != 1 or early):
            return None
        counts = (
            {t: n for t, n in self._counts.items() if n > 0} if penal or p.repetition_penalty != 1 else {}
        )
        ends = [t for t in (*self.eos_ids, *p.stop_token_ids) if t < vocab] if early else []
        seen = np.fromiter(counts, np.int64, len(counts))
        if p.repetition_penalty != 1:
            if self._prompt is None:
                self._prompt = np.flatnonzero(np.bincount(self.prompt))
            seen = np.union1d(seen, self._prompt)
        biased = {t: b for t, b in p.logit_bias.items() if t < vocab}
        tokens = np.unique(np.concatenate((seen, np.fromiter(chain(biased, ends), np.int64))))
        change = np.zeros((len(tokens), 3), np.float32)
        change[:, 1] = 1
        at = lambda ids: np.searchsorted(tokens, np.fromiter(ids, np.int64))  # noqa: E731
        change[at(biased), 0] = np.fromiter(biased.values(), np.float32)
        change[np.searchsorted(tokens, seen), 1] = p.repetition_penalty
        times = np.fromiter(counts.values(), np.float32)
        change[at(counts), 2] = (p.presence_penalty + p.frequency_penalty * times) if penal else 0
        change[at(ends), 2] = math.inf
        return tokens, change


def adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """float32 [S, V] with every row's edits applied; a copy where anything changes."""
    edits = [(i, found) for i, s in enumerate(states) if (found := s.edits(logits.shape[1])) is not None]
    if not edits:
        return logits
    rows = np.concatenate([np.full(len(tokens), i) for i, (tokens, _) in edits])
    row = torch.from_numpy(rows).to(logits.device)
    token = torch.from_numpy(np.concatenate([tokens for _, (tokens, _) in edits])).to(logits.device)
    addend, factor, less = (
        torch.from_numpy(np.concatenate([c for _, (_, c) in edits])).to(logits.device).unbind(1)
    )
    logits = logits.clone()
    value = logits[row, token] + addend
    value = torch.where(value > 0, value / factor, value * factor) - less
    logits[row, token] = value
    return logits


def sample(
    logits: Tensor, states: Sequence[SamplingState], op: Op = reference.sample
) -> list[Sampled | PoisonedLogits]:
    """One token for each row of float32 [S, V]. Each state takes its token in. `op`: a backend's `sample`."""
    params = [s.params for s in states]
    tokens = op(
        adjust(logits, states),
        torch.tensor([p.temperature for p in params], dtype=torch.float64),
        torch.tensor([p.top_k for p in params], dtype=torch.int64),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params], dtype=torch.float64),
        torch.tensor([_signed(s.seed) for s in states], dtype=torch.int64),
        torch.tensor([s.position for s in states], dtype=torch.int64),
        any(p.top_k > 0 or p.top_p < 1 for p in params),
    ).tolist()
    sampled: list[Sampled | PoisonedLogits] = []
    for i, (token, state) in enumerate(zip(tokens, states, strict=True)):
        if token < 0:
            sampled.append(PoisonedLogits("the model gave logits that are not finite"))
            continue
        state.append(token)
        top = state.params.logprobs
        sampled.append(Sampled(token) if top is None else judge(logits[i], token, top))
    return sampled


def _signed(seed: int) -> int:
    """The lowest 64 bits of a seed as int64."""
    return (seed + 2**63) % 2**64 - 2**63


def judge(logits: Tensor, token: int, top: int) -> Sampled:
    """Log-probability, rank and the `top` best alternatives of a token under float32 [V]; equals by lowest id."""
    logprobs = torch.log_softmax(logits, dim=-1)
    rank = int((logits > logits[token]).sum()) + 1
    best: Iterable[int] = reference.largest(logprobs, top)[:top].tolist() if top else ()
    return Sampled(token, float(logprobs[token]), rank, tuple((i, float(logprobs[i])) for i in best))


def logprobs_of(logits: Tensor, targets: Sequence[int], top: int) -> list[Sampled]:
    """`judge` for each row of [N, V] and its target: the log-probabilities of a given text."""
    return [judge(row, target, top) for row, target in zip(logits.cpu(), targets, strict=True)]
