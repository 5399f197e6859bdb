"""One request as the figures need it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4.bench.answer import Answer
from dsv4.bench.conversation import Turn


@dataclass(frozen=True, slots=True)
class Record:
    """Times are seconds; `due`, from the start of the run."""

    session: int
    turn: int
    due: float
    late: float
    """From when it was due until it was sent, a new connection included."""
    ttft: float | None
    """From when it was due: that it was sent late is no merit of the server."""
    e2e: float
    gaps: np.ndarray
    """Between events with text, float32, of all choices."""
    events: int
    prompt: int | None
    cached: int | None
    output: int | None
    wanted: int
    """Tokens of all choices that were asked for."""
    repeats: int
    error: tuple[str, str] | None
    cut: bool
    reconnected: bool
    choices: int

    @classmethod
    def of(cls, answer: Answer, turn: Turn, *, session: int, number: int, start: float, n: int) -> Record:
        """`start`: of the run, on the clock of the answer."""
        gaps = [np.diff(np.asarray(times)) for times in answer.times.values()]
        sent = answer.sent or answer.end
        return cls(
            session,
            number,
            answer.due - start,
            max(sent - answer.due, 0.0),
            answer.first - answer.due if answer.first else None,
            answer.end - answer.due,
            np.concatenate(gaps).astype(np.float32) if gaps else np.zeros(0, np.float32),
            answer.events,
            answer.prompt,
            answer.cached,
            answer.output,
            turn.output * n,
            turn.repeats,
            answer.error,
            answer.cut,
            answer.reconnected,
            len(answer.times),
        )

    @property
    def whole(self) -> bool:
        """It ended as it should."""
        return self.error is None and not self.cut

    @property
    def tokens(self) -> int:
        """Of the answer: as the server counted them, else events with text."""
        return self.events if self.output is None else self.output

    def figure(self, name: str) -> float | None:
        """`ttft`, `itl`, `gap` or `e2e` in ms; None where it has none."""
        if name == "ttft":
            return None if self.ttft is None else 1e3 * self.ttft
        if name == "e2e":
            return 1e3 * self.e2e
        if name == "gap":
            return 1e3 * float(self.gaps.max()) if len(self.gaps) else None
        # Tokens may share an event, so it is the time of all gaps over the tokens after the first of each choice.
        after = self.tokens - self.choices
        return 1e3 * float(self.gaps.sum(dtype=np.float64)) / after if after > 0 and len(self.gaps) else None
