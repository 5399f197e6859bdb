"""Where the time of a routed-experts layer goes, launch by launch: `python3 -m benches.gpu.breakdown`.

For each Triton launch of a call: its time alone, and the time of a graph of it and all before it, both with cold L2 and
overlapping as in use. A number of tokens takes the form that it takes in use; where Gluon has one, Triton's stands beside
it. Kernels of torch are in the whole time only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dsv4.kernels.triton.common import cdiv
from dsv4.kernels.triton.forms import ONE_LAUNCH
from dsv4.kernels.triton.gemm import counters
from dsv4.kernels.triton.moe_few import CHUNK
from triton.runtime.jit import JITFunction

from benches.gpu import moe as moe_bench
from benches.gpu.timing import Bench, max_abs_err


def launches(f: Callable[[], Any]) -> list[tuple[str, Any, partial[Any]]]:
    """(kernel, grid, the launch again) of each Triton launch of `f()`, on the tensors of that call, which stay alive. The
    launch takes another `grid`."""
    found, run = [], JITFunction.run

    def record(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        found.append((self.fn.__name__, kwargs["grid"], partial(run, self, *args, **kwargs)))
        return run(self, *args, **kwargs)

    JITFunction.run = record
    try:
        f()
    finally:
        JITFunction.run = run
    return found


def _all(calls: list[Callable[..., Any]]) -> None:
    for call in calls:
        call()


def first_product_us(bench: Bench, launch: Callable[..., Any], programs: int) -> float:
    """Of the one launch, only the programs of the first product; the counters that these leave are zeroed, and that time
    is taken off."""
    zeros = counters(bench.device)[:4096]

    def run() -> None:
        launch(grid=(programs,))
        zeros.zero_()

    return bench.us(run) - bench.us(zeros.zero_) + bench.floor_us


def _print_launches(
    bench: Bench, label: str, f: Callable[[], Any], expected: torch.Tensor, bound: float
) -> list[tuple[str, Any, partial[Any]]]:
    us, error = bench.us(f), max_abs_err(f(), expected)
    print(f"  {label}: {us:.1f} us {bound / us:.0%}, error {error:.1e}", flush=True)
    found = launches(f)
    for i, (kernel, grid, launch) in enumerate(found):
        until = bench.us(partial(_all, [again for *_, again in found[: i + 1]]))
        print(f"    {kernel:16} grid {grid}: alone {bench.us(launch):6.1f} us, until its end {until:6.1f} us")
    return found


def layer_breakdown(bench: Bench, name: str, tokens: int) -> None:
    count, dim, inner = moe_bench.SHAPES[name]
    model = moe_bench.Experts(count, dim, inner, bench.device)
    gate = torch.randn((count, dim), device=bench.device, dtype=torch.bfloat16) / dim**0.5
    bias = torch.randn(count, device=bench.device) / 10
    x = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
    shared = torch.randn_like(x)
    experts, weights = moe_bench.route(x, gate, bias, None, moe_bench.TOPK, 1.5)
    expected = model.expected(x, experts, weights, shared)
    hit = len(experts.unique())
    size = hit * (model.packed.nbytes // count) + gate.nbytes + 6 * x.numel()
    bound = size / bench.copy_tb_s / 1e6
    print(
        f"{name}, {tokens} tokens, {hit} experts: {size / 1e6:.0f} MB, {bound:.1f} us by copy rate",
        flush=True,
    )
    bound = max(bound, 6 * x.numel() * moe_bench.TOPK * inner / bench.fp8_tf / 1e6)
    f = partial(moe_bench.layer, x, gate, bias, model.packed, shared)
    for backend, kernel in moe_bench.forms(tokens, dim, model.packed).items():
        whole = _print_launches(bench, backend, partial(f, form=kernel), expected, bound)[-1][2]
    if experts.numel() <= ONE_LAUNCH:
        programs = experts.numel() * model.packed.w13.shape[1] * whole.keywords["SPLIT1"]
        programs += tokens * cdiv(dim, CHUNK)
        print(f"    of it the first product: {first_product_us(bench, whole, programs):6.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.breakdown", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=tuple(moe_bench.SHAPES), default=["Flash"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    args = parser.parse_args()
    bench = Bench(quick=True)
    print(
        f"{torch.cuda.get_device_name()}: copy {bench.copy_tb_s:.2f} TB/s, empty graph {bench.floor_us:.1f} us"
    )
    for name in args.models:
        for tokens in args.tokens:
            layer_breakdown(bench, name, tokens)
            bench.free()


if __name__ == "__main__":
    main()
