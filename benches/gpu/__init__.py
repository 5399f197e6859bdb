"""Benches of the GPU kernels: `make bench-gpu`, or `PYTHONPATH=python python3 -m benches.gpu [--only KERNEL,...]`.

A bench file defines `rows(bench)`, which yields a `Row` per shape, and stands in `FILES`. Everything is timed by
`Bench.us`: a CUDA graph, the L2 cache flushed before each replay, the median of several replays.
"""

from __future__ import annotations

FILES: tuple[str, ...] = (
    "attention",
    "attention_parts",
    "gemm_fp8",
    "moe",
    "indexer",
    "rowwise",
    "logits",
    "sampling",
)
"""Modules of this package with rows, in the order of the table. One line per kernel file."""
