"""Steps of designed shapes: what `dsv4 calibrate` has an engine run, and under which name a measured step counts."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.simulate.calibrate import Measured

DECODES = 16
"""Steps that a shape's requests decode together."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 4096, 16_384, 65_536, 262_144)
TAIL = 64
"""Tokens that are new when a prompt comes again, so that it resumes from its state."""
FULL = 0.8
"""Share of the pool that a shape may take: what it measures is not evicted meanwhile."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes."""

    rows: int
    """Requests at a time."""
    step_tokens: int
    max_len: int
    pool_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """`batch` prompts of `context` tokens: each is read alone, all come again with TAIL more tokens (their states are restored), and
    decode together."""

    batch: int
    context: int
    beside: int = 0
    """Tokens of a prompt that is read beside the decodes."""

    @property
    def name(self) -> str:
        beside = f" beside a prompt of {self.beside:,}" if self.beside else ""
        return f"{self.batch} at {self.context:,}{beside}"

    @property
    def most_new(self) -> int:
        """Tokens that a request gets at most: it begins to decode while others are read."""
        return 4 * DECODES + 2 * self.batch


def designed(limits: Limits) -> list[Shape]:
    """The shapes that fit, the cheap ones first, so that whatever time there is gives a spread of them."""

    def fits(s: Shape) -> bool:
        longest = s.context + TAIL + s.most_new
        return (
            s.batch + bool(s.beside) <= limits.rows
            and max(longest, s.beside + 1) <= limits.max_len
            and s.batch * longest + s.beside <= FULL * limits.pool_tokens
        )

    # Beside decodes several chunks are read, at several positions; alone, prompts that are shorter than a step, too.
    beside = 2 * limits.step_tokens
    contexts = dict.fromkeys((TAIL, max(limits.step_tokens // 2, 2), *CONTEXTS))
    shapes = [Shape(batch, context) for context in contexts for batch in BATCHES]
    shapes += [Shape(batch, context, beside) for context in CONTEXTS[:3] for batch in BATCHES[::2]]
    return sorted(
        filter(fits, dict.fromkeys(shapes)), key=lambda s: (s.batch * s.context + s.beside, s.batch)
    )


def kind_of(step: Measured) -> str:
    """`8 decodes at 4K`, `512 prompt tokens at 2K`, `4 decodes at 1K + 512 prompt tokens at 0`, with `, states copied`: steps of
    one kind are alike."""
    decodes = [start for start, length in step.rows if length == 1]
    pieces = [(start, length) for start, length in step.rows if length > 1]
    parts = []
    if decodes:
        parts.append(
            f"{len(decodes)} decode{'s' * (len(decodes) > 1)} at {_near(sum(decodes) // len(decodes))}"
        )
    if pieces:
        tokens = sum(n for _, n in pieces)
        parts.append(f"{'few' if tokens < 64 else _near(tokens)} prompt tokens at {_near(pieces[0][0])}")
    return " + ".join(parts) + (", states copied" if step.copies else "")


def _near(n: int) -> str:
    """The power of two below, in short: contexts of one kind are within a factor of two."""
    if n < 64:
        return "0"
    power = 1 << (n.bit_length() - 1)
    return f"{power}" if power < 1024 else f"{power >> 10}K" if power < 2**20 else f"{power >> 20}M"
