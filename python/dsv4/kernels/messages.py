"""Which messages of ranks are written straight into their memory (`triton/exchange.py`), and the room that these take. Imports no torch."""

from __future__ import annotations

LIMIT = 1 << 20 | 1 << 14
"""Bytes of the longest message from one rank to another that is written into its memory: 1 MiB, and room for the log-sum-exps that cross
beside parts of attention (4 KiB beside 1 MiB: Flash's 32 rows on two ranks, which each step with a long prompt has). Up to 256 KiB that takes a
fifth of NCCL's time on two H200 (4.2 and 21.1 us at 256 KiB). It moves twice the bytes, so for long messages NCCL wins; from where on has
not been measured."""


def room(ranks: int) -> int:
    """Bytes of a rank's memory for the messages of its peers: two slots for each rank, of 64-bit pairs of a 32-bit word and a number."""
    return 2 * ranks * LIMIT // 4 * 8
