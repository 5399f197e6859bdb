"""Logits to tokens. A row's token depends on its logits, its own request and its position, never on the batch.

Order: logit bias, penalties, min_tokens (the op `edit_logits`), the grammar's mask (the op `mask_logits`), then temperature, min_p,
top_k, top_p and one draw (the op `sample`). Log-probabilities are those of the model's own logits, before any of that.

What sampling needs of a request lies on the device in tables by slab, sent when the request starts there. So a step's tokens are
drawn without asking the host, and stay on the device as the next step's input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.engine.request import Sampled
from dsv4.ops.registry import Ops
from dsv4.ops.tables import END, PROMPT
from dsv4.sampling import SamplingParams
from dsv4.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class Judged:
    """Log-probabilities of N tokens and the best alternatives of each, on the device: float32 [N], int64 [N] (ranks from 1),
    int64 [N, top] and float32 [N, top]."""

    logprob: Tensor
    rank: Tensor
    ids: Tensor
    values: Tensor

    def to_host(self) -> Judged:
        """On the host, once the device is so far (see `transfer.to_host`)."""
        return Judged(*(to_host(x) for x in (self.logprob, self.rank, self.ids, self.values)))

    def sampled(self, tokens: Sequence[int], tops: Sequence[int]) -> list[Sampled]:
        """One by one, each with the number of alternatives that it asked for."""
        columns = (x.tolist() for x in (self.logprob, self.rank, self.ids, self.values))
        return [
            Sampled(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
            for token, top, logprob, rank, ids, values in zip(tokens, tops, *columns, strict=True)
        ]


def judge(logits: Tensor, tokens: Tensor, top: int) -> Judged:
    """Log-probability and rank of int64 [N] under float32 [N, V], and the `top` best, equals by lowest id."""
    logprobs = torch.log_softmax(logits, dim=-1)
    at = tokens.unsqueeze(1)
    rank = (logits > logits.gather(1, at)).sum(1) + 1
    # A key orders by logit and then by lowest id, so that the choice among equals is no accident.
    bits = (logits + 0.0).view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
    order |= 0xFFFFFFFF - torch.arange(logits.shape[1], device=logits.device)
    ids = order.topk(min(top, logits.shape[1])).indices
    return Judged(logprobs.gather(1, at).squeeze(1), rank, ids, logprobs.gather(1, ids))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's tokens on the device, int64 [S], -2 where logits were not finite, and what is known of those whose requests
    want log-probabilities: their places among the S and how many alternatives each wants."""

    tokens: Tensor
    judged: Judged | None = None
    places: Sequence[int] = ()
    tops: Sequence[int] = ()

    def to_host(self) -> Drawn:
        """On the host, once the device is so far (see `transfer.to_host`)."""
        judged = self.judged and self.judged.to_host()
        return Drawn(to_host(self.tokens), judged, self.places, self.tops)

    def sampled(self) -> dict[int, Sampled]:
        """By place, the log-probabilities that were asked for."""
        if self.judged is None:
            return {}
        tokens = [int(self.tokens[i]) for i in self.places]
        return dict(zip(self.places, self.judged.sampled(tokens, self.tops), strict=True))


@dataclass(frozen=True, slots=True)
class Kind:
    """What has to be launched for a step's draw: edits of logits, masks of grammars, and the selection of top_k and top_p."""

    edited: bool
    masked: bool
    filtered: bool

    def words(self) -> str:
        """`edited, masked`, or `plain`."""
        return (
            ", ".join(
                name
                for name, on in zip(
                    ("edited", "masked", "filtered"), (self.edited, self.masked, self.filtered), strict=True
                )
                if on
            )
            or "plain"
        )


KINDS = tuple(Kind(*flags) for flags in itertools.product((False, True), repeat=3))


class Sampler:
    """The tables of all slabs, on one device. Row `slabs` of the edit tables changes nothing; it serves requests without
    edits."""

    def __init__(self, ops: Ops, slabs: int, vocab: int, device: torch.device | str) -> None:
        self._ops, self._vocab, self._plain = ops, vocab, slabs
        make = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        self._knobs = make(slabs, 4, dtype=torch.float64)
        self._seed = make(slabs, dtype=torch.int64)
        self._row = torch.full((slabs,), slabs, device=device)
        self._bias = make(slabs + 1, vocab, dtype=torch.float32)
        self._marks = make(slabs + 1, vocab, dtype=torch.int32)
        self._penalties = make(slabs + 1, 3, dtype=torch.float32)
        self._penalties[:, 0] = 1
        self._until = make(slabs + 1, dtype=torch.int64)
        self._mask_row = torch.full((slabs,), -1, device=device)
        self._masks = make(slabs, -(-vocab // 32), dtype=torch.int32)
        # What the host has to know beforehand, as it decides what is launched.
        self._filtered, self._edited = np.zeros(slabs, bool), np.zeros(slabs, bool)
        self._masked, self._tops = np.zeros(slabs, bool), np.full(slabs, -1)

    def begin(
        self,
        slab: int,
        params: SamplingParams,
        *,
        prompt: np.ndarray,
        output: Sequence[int],
        seed: int,
        ends: Sequence[int],
    ) -> None:
        """A request goes on at this slab after `prompt` (int32) and `output`. `ends`: tokens that end it."""
        p = params
        self._knobs[slab] = self._sent([p.temperature, p.top_k, p.top_p, p.min_p], torch.float64)
        # Filled: a number that is assigned to one place of a GPU is copied there, and waited for.
        self._seed[slab].fill_((seed + 2**63) % 2**64 - 2**63)
        self._filtered[slab] = p.top_k > 0 or p.top_p < 1
        self._tops[slab] = -1 if p.logprobs is None else p.logprobs
        penal = bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)
        masked = self._masked[slab] = p.grammar is not None
        self._mask_row[slab].fill_(slab if masked else -1)
        least = 0 if masked else p.min_tokens  # masks see to it, as they know when the answer has to end
        edited = self._edited[slab] = penal or bool(p.logit_bias) or least > len(output)
        self._row[slab].fill_(slab if edited else self._plain)
        if not edited:
            return
        penalties = [p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
        self._penalties[slab] = self._sent(penalties, torch.float32)
        self._until[slab].fill_(len(prompt) + least - 1)
        bias, marks = self._bias[slab].zero_(), self._marks[slab].zero_()
        biased = {t: b for t, b in p.logit_bias.items() if t < self._vocab}
        if biased:
            bias[self._sent(list(biased), torch.int64)] = self._sent(list(biased.values()), torch.float32)
        if penal and len(output):
            said = self._sent(output, torch.int64)
            marks.index_add_(0, said, torch.ones_like(said, dtype=torch.int32))
        if p.repetition_penalty != 1:
            prompt_ids = self._sent(prompt, torch.int64)
            marks[prompt_ids] = (
                marks[prompt_ids] | PROMPT
            )  # of a token that comes twice both writes are equal
        if least:
            ended = self._sent(sorted({t for t in ends if t < self._vocab}), torch.int64)
            marks[ended] += END

    def _sent(self, values: Any, dtype: torch.dtype) -> Tensor:
        return to_device(torch.as_tensor(values, dtype=dtype), self._knobs.device)

    def kind(self, slabs: np.ndarray) -> Kind:
        """Of a draw for these slabs."""
        return Kind(*(bool(x[slabs].any()) for x in (self._edited, self._masked, self._filtered)))

    def constrain(self, slabs: np.ndarray, masks: np.ndarray) -> None:
        """The next draw of these slabs, of requests with a grammar, takes only tokens that int32 [N, ceil(V / 32)] has the bits of."""
        self._masks[self._sent(slabs, torch.int64)] = self._sent(masks, torch.int32)

    def judges(self, slabs: np.ndarray) -> bool:
        """Whether one of them wants log-probabilities."""
        return bool((self._tops[slabs] >= 0).any())

    def draw(self, logits: Tensor, slabs: np.ndarray, positions: np.ndarray) -> Drawn:
        """A token for each row of float32 [S, V]: of slab `slabs[s]`, after the token at `positions[s]`. Does not wait."""
        at, position = self._sent(slabs, torch.int64), self._sent(positions, torch.int64)
        places = np.flatnonzero(self._tops[slabs] >= 0)
        if not len(places):
            return Drawn(self.tokens(logits, at, position, self.kind(slabs)))
        tops = self._tops[slabs[places]]
        rows = self._sent(places, torch.int64)
        own = logits[rows]  # a copy, as masks are written into the logits
        tokens = self.tokens(logits, at, position, self.kind(slabs))
        judged = judge(own, tokens[rows].clamp(min=0), int(tops.max()))
        return Drawn(tokens, judged, places.tolist(), tops.tolist())

    def tokens(self, logits: Tensor, at: Tensor, position: Tensor, kind: Kind) -> Tensor:
        """int64 [S] for float32 [S, V], slabs and positions int64 [S] on the device. Masks are written into the
        logits. A CUDA graph can hold it where no op is on the reference."""
        row = self._row[at]
        if kind.edited:
            tables = self._bias, self._marks, self._penalties, self._until
            logits = self._ops.edit_logits(logits, row, *tables, position)
        if kind.masked:
            self._ops.mask_logits(logits, self._mask_row[at], self._masks)
        tokens = self._ops.sample(logits, self._knobs[at], self._seed[at], position, kind.filtered)
        if kind.edited:  # the plain row counts as well, to no effect
            said = tokens.clamp(min=0)
            self._marks[row, said] = self._marks[row, said] + 1
        return tokens
