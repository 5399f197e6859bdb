"""Which tokens may come next, by the grammars of requests: a bit for each token of the vocabulary.

A constraint follows the tokens that are committed and nothing else, so steps that failed and requests that were preempted change nothing
in it. Masks are made on the host while the device runs the step's forward; the library works on threads of its own and holds no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from dsv4.engine.bars import Bars
from dsv4.engine.buffers import words
from dsv4.errors import RequestError


@dataclass(frozen=True, slots=True)
class Masks:
    """`places` int64 [N] among a step's samples, and `bits` int32 [N, ceil(V / 32)]: token t may come where bit t % 32 of word t // 32
    is set."""

    places: np.ndarray
    bits: np.ndarray


class Constraint:
    """The grammar of one live request, and how far its answer has come in it."""

    def __init__(
        self,
        matcher: LLMatcher,
        field: str,
        *,
        ends: Sequence[int],
        least: int,
        bars: Bars | None = None,
        anew: Callable[[], LLMatcher] | None = None,
    ) -> None:
        """`ends`: tokens that end the answer; they do not before `least` tokens, unless nothing else may come. `bars`: of a chat, which
        spells no markup. `anew`: gives a matcher at the start of the same grammar, with a lexer that has not failed."""
        self.matcher, self._field, self._ends, self._least = matcher, field, frozenset(ends), least
        self._anew, self._renewed = anew, -1
        self._bars, self._tail = bars, b""
        self._followed = 0
        self.free = False
        """The answer has ended, and whatever comes is nobody's."""

    def news(self, output: Sequence[int]) -> list[int]:
        """What the matcher has not seen of `output`, the answer so far, which counts as seen from here on."""
        new, self._followed = list(output[self._followed :]), len(output)
        if self.free or not new:
            return []
        if self._bars is not None:
            self._tail = self._bars.follow(self._tail, new)
        self.free = not self._ends.isdisjoint(new)
        return [] if self.free else new

    def renew(self, output: Sequence[int]) -> bool:
        """Goes the way of `output` again in a matcher that is `anew`: requests share a grammar's lexer, whose states are bounded, so that
        theirs may be what it failed of. False where that failed too, or the answer has not grown since it was done last."""
        if self._anew is None or self._followed == self._renewed:
            return False
        self._renewed = self._followed
        try:
            self.matcher = self._anew()
        except RequestError:
            return False
        return not output or self.matcher.consume_tokens(list(output))

    def fault(self) -> str:
        """One line that names the field."""
        why = (self.matcher.get_error() or "no token may come next").strip().partition("\n")[0]
        return f"{self._field} could not be followed any further: {why[:200]}"

    def finish(self, bits: np.ndarray) -> None:
        """Bars what spells markup, and what ends an answer that is too short yet, in int32 [ceil(V / 32)], unless nothing else is left."""
        if self._bars is not None:
            self._bars.apply(bits, self._tail)
        if self._followed < self._least:
            for token in self._ends:
                word, bit = divmod(token, 32)
                if word < len(bits):
                    rest = bits[word] & ~np.int32(np.uint32(1 << bit).view(np.int32))
                    if rest or bits[:word].any() or bits[word + 1 :].any():
                        bits[word] = rest


class MaskMaker:
    """Makes the masks of steps for one vocabulary."""

    def __init__(self, vocab: int, *, pinned: bool = False) -> None:
        """`pinned`: masks are written into page-locked memory, from which a GPU copies by itself."""
        self._words, self._executor, self._pinned = -(-vocab // 32), LLExecutor(), pinned

    def masks(
        self, constrained: Sequence[tuple[int, Constraint | None, Sequence[int]]]
    ) -> tuple[Masks, dict[int, str]]:
        """`constrained`: place among the step's samples, what holds it (None: nothing any more), and the answer so far. By place also
        what failed; its mask bars nothing."""
        answers = {one: output for _, one, output in constrained if one is not None}
        faults = self._follow(answers)
        bits = words((len(constrained), self._words), pinned=self._pinned)
        todo: dict[int, Constraint] = {}
        for i, (_, one, _) in enumerate(constrained):
            if one is None or one.free or one in faults:
                bits[i] = -1
            else:
                todo[i] = one
        if todo:
            fill_next_token_bitmask_par(self._executor, [(one.matcher, i) for i, one in todo.items()], bits)
        for i, one in todo.items():
            if one.matcher.is_error() and one.renew(answers[one]):
                fill_next_token_bitmask(one.matcher, bits, i)
            one.finish(bits[i])
        left = bits.any(axis=1)
        for i, one in todo.items():
            if one.matcher.is_error() or not left[i]:
                faults[one], bits[i] = one.fault(), -1
        failed = {place: faults[one] for place, one, _ in constrained if one in faults}
        return Masks(np.array([place for place, *_ in constrained], np.int64), bits), failed

    def _follow(self, answers: Mapping[Constraint, Sequence[int]]) -> dict[Constraint, str]:
        """All go on to the end of their answers, those with one token more, as is usual, beside each other; what is wrong, by constraint."""
        new = {one: tokens for one, output in answers.items() if (tokens := one.news(output))}
        single = [(one, tokens[0]) for one, tokens in new.items() if len(tokens) == 1]
        took: dict[Constraint, bool] = {}
        if single:
            fine = self._executor.consume_token_par([(one.matcher, token) for one, token in single])
            took |= zip((one for one, _ in single), fine, strict=True)
        took |= {one: one.matcher.consume_tokens(tokens) for one, tokens in new.items() if len(tokens) > 1}
        return {one: one.fault() for one, fine in took.items() if not fine and not one.renew(answers[one])}
