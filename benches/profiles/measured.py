"""Steps that were measured on GPUs beside what the step model says of them: 8 layers of Flash's widths on one card, and all of it on two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4._core import StepModel
from dsv4.gpus import gpu
from dsv4.plan.weights import find_weights
from dsv4.simulate.device import step_coefficients

H100, H200, BEFORE = (
    "h100-80gb-hbm3/engine-2026-11-28.md",
    "h200/engine-2026-11-30.md",
    "h200/engine-2026-11-29.md",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure of `benches/results`."""

    gpu: str
    what: str
    steps: tuple[tuple[tuple[int, int], ...], ...]
    """Of each step its rows: (context before, tokens)."""
    ms: float
    """Of all steps."""
    source: str
    layers: int = 8
    ranks: int = 1


def _decodes(rows: int, context: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return (((context, 1),) * rows,)


def _prompt(tokens: int, step: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((at, min(step, tokens - at)),) for at in range(0, tokens, step))


MEASURED = (
    Measured("h200", "decode step, 1 row after 4,096 tokens", _decodes(1, 4096), 1.424, H200),
    Measured("h200", "decode step, 8 rows", _decodes(8, 4096), 2.523, H200),
    Measured("h200", "decode step, 32 rows", _decodes(32, 4096), 5.225, H200),
    Measured("h100", "decode step, 128 rows", _decodes(128, 4096), 6.77, H100),
    Measured("h100", "prompt of 8,192 tokens, steps of 4,096", _prompt(8192, 4096), 8192 / 85.583, H100),
    Measured("h100", "prompt of 32,768 tokens, steps of 4,096", _prompt(32768, 4096), 32768 / 80.608, H100),
    Measured("h100", "64 new tokens after 32,768 cached", (((32768, 64),),), 9.2, H100),
    Measured("h100", "1,024 new tokens after 32,768 cached", (((32768, 1024),),), 35.5, H100),
    *(
        Measured("h200", f"two GPUs, 43 layers: {what}", steps, ms, source, 43, 2)
        for what, steps, ms, source in (
            ("decode step, 1 row after 4,096 tokens", _decodes(1, 4096), 5.77, H200),
            ("decode step, 8 rows", _decodes(8, 4096), 9.45, H200),
            ("decode step, 32 rows", _decodes(32, 4096), 20.83, BEFORE),
            ("decode step, 1 row after 1,000,000 tokens", _decodes(1, 1000000), 6.42, H200),
            ("prompt of 32,768 tokens, steps of 8,192", _prompt(32768, 8192), 1199.0, H200),
            ("prompt of 1,000,000 tokens, steps of 8,192", _prompt(1000000, 8192), 88160.0, H200),
        )
    ),
)


def measure() -> list[dict[str, Any]]:
    """A row for each figure, times in ms."""
    rows = []
    for m in MEASURED:
        config, _, _ = find_weights("v4-flash", num_layers=m.layers)
        layout = config.layout("fp8_ds_mla", "mxfp4")
        model = StepModel(step_coefficients(config, layout, gpu(m.gpu), m.ranks))
        told = 0.0
        for step in m.steps:
            fixed, parts = model.parts(step, 0)
            told += (fixed + sum(map(max, parts))) / 1000
        rows.append(
            {"gpu": m.gpu, "what": m.what, "measured_ms": m.ms, "simulated_ms": told, "source": m.source}
        )
    return rows
