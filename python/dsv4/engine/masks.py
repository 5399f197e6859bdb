"""Which tokens may come next, by the grammars of requests: a bit for each token of the vocabulary.

A form follows the tokens that are committed and nothing else, so steps that failed and requests that were preempted change nothing
in it. Masks are made on the host while the device runs the step's forward; the library works on threads of its own and holds no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par


@dataclass(frozen=True, slots=True)
class Masks:
    """`places` int64 [N] among a step's samples, and `bits` int32 [N, ceil(V / 32)]: token t may come where bit t % 32 of word t // 32
    is set."""

    places: np.ndarray
    bits: np.ndarray


class Form:
    """The grammar of one live request, and how far its answer has come in it."""

    def __init__(self, matcher: LLMatcher, field: str, *, ends: Sequence[int], least: int) -> None:
        """`ends`: tokens that end the answer; they do not before `least` tokens, unless nothing else may come."""
        self.matcher, self._field, self._ends, self._least = matcher, field, frozenset(ends), least
        self._followed = 0
        self.free = False
        """The answer has ended, and whatever comes is nobody's."""

    def follow(self, output: Sequence[int]) -> str | None:
        """Goes on to the end of `output`, the answer so far; what is wrong, if anything is."""
        new, self._followed = list(output[self._followed :]), len(output)
        if self.free or not new:
            return None
        self.free = not self._ends.isdisjoint(new)
        return None if self.free or self.matcher.consume_tokens(new) else self.fault()

    def fault(self) -> str:
        """One line that names the field."""
        why = (self.matcher.get_error() or "no token may come next").strip().partition("\n")[0]
        return f"{self._field} could not be followed any further: {why[:200]}"

    def finish(self, bits: np.ndarray) -> bool:
        """Bars what ends an answer that is too short yet, in int32 [ceil(V / 32)]; False when nothing is left at all."""
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

    def masks(self, forms: Sequence[tuple[int, Form, Sequence[int]]]) -> tuple[Masks, dict[int, str]]:
        """`forms`: place among the step's samples, form, and the answer so far. By place also what failed; its mask bars nothing."""
        bits = np.full((len(forms), self._words), -1, np.int32)
        failed: dict[int, str] = {}
        todo: list[tuple[LLMatcher, int]] = []
        for i, (place, form, output) in enumerate(forms):
            if (fault := form.follow(output)) is not None:
                failed[place] = fault
            elif not form.free:
                todo.append((form.matcher, i))
        if todo:
            fill_next_token_bitmask_par(self._executor, todo, bits)
        for matcher, i in todo:
            place, form, _ = forms[i]
            if matcher.is_error() or not form.finish(bits[i]):
                failed[place], bits[i] = form.fault(), -1
        return Masks(np.array([place for place, *_ in forms], np.int64), bits), failed
