"""The least time that memory and matrix units of this machine allow, by its rates in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from dsv4._core import StepModel
from dsv4.gpus import Gpu
from dsv4.model.config import ModelConfig
from dsv4.simulate.device import Shares, step_coefficients

_ALL = Shares(
    weight_read=1, index_read=1, row_read=1, linear=1, index=1, attention=1, kernel_us=0, copy_launch_us=0,
    collective_us=0, collective_bytes_per_s=float("inf"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this machine: a copy (bytes read plus bytes written), and products of large matrices."""

    copy_tb_s: float
    bf16_tf: float
    fp8_tf: float


def measured(*, on_gpu: bool) -> Rates:
    """On the CPU a copy and a product in float32, which stand for all."""
    if on_gpu:
        from benches.gpu.timing import Bench

        bench = Bench(quick=True)
        rates = Rates(bench.copy_tb_s, bench.bf16_tf, bench.fp8_tf)
        bench.free()
        return rates
    a, b, n = torch.ones(1 << 24), torch.empty(1 << 24), 512
    square = torch.ones((n, n))
    flops = 2e-12 * n**3 / _seconds(lambda: square @ square)
    return Rates(2e-12 * a.nbytes / _seconds(lambda: b.copy_(a)), flops, flops)


def _seconds(f: object) -> float:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        f()  # type: ignore[operator]
        times.append(time.perf_counter() - begun)
    return min(times)


class Limits:
    """Of a model on this machine. A step takes no less than the larger of what it reads at the copy rate and what it multiplies at the
    peak, part by part: the step model of `dsv4 simulate`, with these rates and every share 1; of several ranks that of one, without what
    they tell each other."""

    def __init__(self, config: ModelConfig, layout: object, rates: Rates, ranks: int = 1) -> None:
        fp8 = rates.fp8_tf if rates.fp8_tf == rates.fp8_tf else rates.bf16_tf
        gpu = Gpu("this one", 0, rates.copy_tb_s * 1e12, rates.bf16_tf * 1e12, fp8 * 1e12, 1, "measured")
        self.rates = rates
        self._model = StepModel(step_coefficients(config, layout, gpu, ranks, _ALL))  # type: ignore[arg-type]

    def ms(self, rows: list[tuple[int, int]]) -> float:
        """Of a step with rows (first position, tokens)."""
        _, parts = self._model.parts(rows, 0)
        return sum(max(pair) for pair in parts) / 1e3

    def decode(self, rows: int, context: int) -> float:
        """Milliseconds of a step of `rows` single tokens."""
        return self.ms([(context, 1)] * rows)

    def prompt(self, tokens: int, step: int, start: int = 0) -> float:
        """Milliseconds of `tokens` tokens after `start`, read in steps of `step`."""
        return sum(self.ms([(start + at, min(step, tokens - at))]) for at in range(0, tokens, step))
