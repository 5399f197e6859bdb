"""How kernels are timed, and the machine's own limits in the same run."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""Read before each replay: several times the L2 cache of any GPU."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `bytes`: least bytes that must move (each input read once, each output written once);
    `flops`: operations of the matrix products, run at the peak named by `peak` ("bf16" or "fp8"). `peer`: name of the
    public kernel timed on the same inputs, "" when there is none."""

    kernel: str
    shape: str
    batch: int
    context: int
    us: float
    bytes: int
    flops: int = 0
    peak: str = "bf16"
    peer: str = ""
    peer_us: float | None = None
    max_abs_err: float | None = None


class Bench:
    """Times functions on the current CUDA device and knows its measured limits."""

    def __init__(self, *, quick: bool = False, repeats: int = 15) -> None:
        self.quick, self.repeats = quick, 5 if quick else repeats
        self.device = torch.device("cuda")
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.floor_us = self.us(lambda: self._flush[:1].add_(0))
        self.copy_tb_s = self._copy()
        self.bf16_tf, self.fp8_tf = self._gemm(torch.bfloat16), self._gemm(torch.float8_e4m3fn)

    def us(self, f: Callable[[], Any], repeats: int | None = None) -> float:
        """Median microseconds of `f()`, captured into a CUDA graph, with cold L2. Includes the floor of an empty graph
        (`floor_us`)."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                f()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            f()
        graph.replay()
        times = []
        for _ in range(repeats or self.repeats):
            self._flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        del graph
        return median(times)

    def limit_us(self, row: Row) -> float:
        """The least time that memory or the matrix units allow, from this run's copy rate and matrix peak."""
        peak = {"bf16": self.bf16_tf, "fp8": self.fp8_tf}[row.peak]
        return max(row.bytes / self.copy_tb_s, row.flops / peak) / 1e6

    def record(self, row: Row) -> dict[str, Any]:
        """The row as it is written to the results file."""
        fields = asdict(row)
        fields["share_of_limit"] = round(self.limit_us(row) / row.us, 4)
        fields["us"] = round(row.us, 2)
        return fields

    def free(self) -> None:
        """Gives cached memory back between kernel files."""
        gc.collect()
        torch.cuda.empty_cache()

    def _copy(self) -> float:
        """TB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written: the better of the driver's copy and a
        kernel's."""
        a = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda").view(torch.int64)
        b = torch.empty_like(a)
        ways = (lambda: b.copy_(a), lambda: torch.add(a, 1, out=b))
        return 2 * a.nbytes / min(self.us(way) for way in ways) / 1e6

    def _gemm(self, dtype: torch.dtype) -> float:
        """TFLOP/s of an 8192^3 product of random matrices through torch."""
        n = 8192
        a, b = (torch.randn((n, n), device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
        if dtype == torch.bfloat16:
            return 2 * n**3 / self.us(lambda: a @ b) / 1e6
        one = torch.ones((), device="cuda")
        try:
            run = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
            return 2 * n**3 / self.us(run) / 1e6
        except RuntimeError as e:  # no FP8 units
            print(f"fp8 peak not measured: {e}", file=sys.stderr)
            return float("nan")


def max_abs_err(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute error; NaN shows as infinity."""
    error = float((out.double() - reference.double()).abs().max())
    return error if error == error else float("inf")
