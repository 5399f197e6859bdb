"""Which tokens may come next, by the grammars of requests: a bit for each token of the vocabulary.

A constraint follows the tokens that are committed and nothing else, so steps that failed and requests that were preempted change nothing
in it. Masks are made on the host while the device runs the step's forward; the library works on threads of its own and holds no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from dsv4.engine.bars import Bars


@dataclass(frozen=True, slots=True)
class Masks:
    """`places` int64 [N] among a step's samples, and `bits` int32 [N, ceil(V / 32)]: token t may come where bit t % 32 of word t // 32
    is set."""

    places: np.ndarray
    bits: np.ndarray


class Constraint:
    """The grammar of one live request, and how far its answer has come in it."""

    def __init__(
        self, matcher: LLMatcher, field: str, *, ends: Sequence[int], least: int, bars: Bars | None = None
    ) -> None:
        """`ends`: tokens that end the answer; they do not before `least` tokens, unless nothing else may come. `bars`: of a chat, which
        spells no markup."""
        self.matcher, self._field, self._ends, self._least = matcher, field, frozenset(ends), least
        self._bars, self._tail = bars, b""
        self._followed = 0
        self.free = False
        """The answer has ended, and whatever comes is nobody's."""

    def follow(self, output: Sequence[int]) -> str | None:
        """Goes on to the end of `output`, the answer so far; what is wrong, if anything is."""
        new, self._followed = list(output[self._followed :]), len(output)
        if self.free or not new:
            return None
        if self._bars is not None:
            self._tail = self._bars.follow(self._tail, new)
        self.free = not self._ends.isdisjoint(new)
        return None if self.free or self.matcher.consume_tokens(new) else self.fault()

    def fault(self) -> str:
        """One line that names the field."""
        why = (self.matcher.get_error() or "no token may come next").strip().partition("\n")[0]
        return f"{self._field} could not be followed any further: {why[:200]}"

    def finish(self, bits: np.ndarray) -> bool:
        """Bars what spells markup, and what ends an answer that is too short yet, in int32 [ceil(V / 32)]; False when nothing is left at
        all."""
        if self._bars is not None:
            self._bars.apply(bits, self._tail)
        if self._followed < self._least:
            for token in self._ends:
                word, bit = divmod(token, 32)
                if word < len(bits):
                    rest = bits[word] & ~np.int32(np.uint32(1 << bit).view(np.int32))
                    if rest or bits[:word].any() or bits[word + 1 :].any():
                        bits[word] = rest
        return bool(bits.any())


class MaskMaker:
    """Makes the masks of steps for one vocabulary."""

    def __init__(self, vocab: int) -> None:
        self._words, self._executor = -(-vocab // 32), LLExecutor()

    def masks(
        self, constrained: Sequence[tuple[int, Constraint | None, Sequence[int]]]
    ) -> tuple[Masks, dict[int, str]]:
        """`constrained`: place among the step's samples, what holds it (None: nothing any more), and the answer so far. By place also
        what failed; its mask bars nothing."""
        bits = np.full((len(constrained), self._words), -1, np.int32)
        failed: dict[int, str] = {}
        todo: dict[int, Constraint] = {}
        for i, (place, one, output) in enumerate(constrained):
            if one is None:
                continue
            if (fault := one.follow(output)) is not None:
                failed[place] = fault
            elif not one.free:
                todo[i] = one
        if todo:
            fill_next_token_bitmask_par(self._executor, [(one.matcher, i) for i, one in todo.items()], bits)
        for i, one in todo.items():
            if one.matcher.is_error() or not one.finish(bits[i]):
                failed[constrained[i][0]], bits[i] = one.fault(), -1
        return Masks(np.array([place for place, *_ in constrained], np.int64), bits), failed
