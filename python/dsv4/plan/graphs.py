"""Which decode steps are captured as CUDA graphs (dsv4.engine.graphs): batch sizes times contexts."""

from __future__ import annotations

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured steps. Padding rows are alike, so together they cost the experts that one row reads."""

SHORTEST = 2048
"""Tokens of the shortest context. What is longer is captured by powers of two."""


def sizes_of(running: int) -> tuple[int, ...]:
    """Sizes that steps of up to `running` rows take; larger steps than the largest run without a graph."""
    return tuple(n for i, n in enumerate(SIZES) if i == 0 or SIZES[i - 1] < running)


def contexts_of(max_len: int) -> tuple[int, ...]:
    """Contexts in tokens that steps up to `max_len` take."""
    powers = (SHORTEST << i for i in range(max_len.bit_length()))
    return (*(n for n in powers if n < max_len), max_len)


def steps_of(running: int, max_len: int) -> int:
    """Steps that are captured at most."""
    return len(sizes_of(running)) * len(contexts_of(max_len))
