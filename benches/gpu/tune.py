"""Times the products with other settings than the chosen ones: `python3 -m benches.gpu.tune gemm_fp8 moe`. Prints, per
shape, the settings from fast to slow; what wins belongs into the kernel file's own choice."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from dsv4.kernels.cublas import linear as cublas
from dsv4.kernels.triton import gemm, moe
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.weight import Fp8Weight
from torch import Tensor

from benches.gpu import gemm_fp8 as gemm_bench
from benches.gpu import moe as moe_bench
from benches.gpu.timing import Bench


def settings(**values: Iterable[int]) -> list[dict[str, int]]:
    """Every combination."""
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]


def compare(
    bench: Bench, label: str, run: Callable[..., Tensor], tries: list[dict[str, Any]], bound: float
) -> None:
    """One line per setting, fastest first; `bound` in microseconds."""
    found = []
    for tune in [{}, *tries]:
        try:
            found.append((bench.us(partial(run, tune=tune), 7), tune))
        except Exception as e:  # too much shared memory, or a compiler that gives up: a result like any other
            print(f"{label} {tune}: {type(e).__name__} {str(e)[:100]}")
    for us, tune in sorted(found, key=lambda f: f[0])[:6] + [f for f in found if not f[1]]:
        print(f"{label}: {us:8.1f} us {bound / us:4.0%}  {tune or 'default'}", flush=True)


ONE = {"one_wave": True}
FEW: tuple[dict[str, Any], ...] = (ONE, ONE | {"ahead": 0}, ONE | {"ahead": 64}, {"sum": 8})
"""Tries for few tokens: one wave of programs, its weights asked for earlier or not, and the present form with its parts added
up in one go."""


def gemms(bench: Bench) -> None:
    """Few tokens, then two products in a row, which overlap, then many."""
    for name in (
        "Flash wq_a",
        "Flash wq_b",
        "Flash wo_a",
        "Flash wo_b",
        "Flash shared w2",
        "Pro wo_a",
        "Pro wo_b",
    ):
        groups, out, width = gemm_bench.SHAPES[name]
        w, ws = gemm_bench.weights(groups * out, width, bench.device)
        packed = cublas.linear.prepare(Fp8Weight(w, ws, torch.bfloat16))
        for tokens in (1, 32, 64, 128):
            x = torch.randn((tokens, groups * width), device=bench.device, dtype=torch.bfloat16)
            run = partial(gemm.narrow, x, w, ws, out_dtype=torch.bfloat16, groups=groups)
            tries = list(FEW)
            if tokens > 16:
                tries = [ONE, ONE | {"fused": 16}] if tokens <= 64 else [ONE, ONE | {"bn": 64}]
            moved = w.numel() + 2 * x.numel() + 2 * tokens * groups * out
            bound = max(moved / bench.copy_tb_s, 2 * tokens * w.numel() / bench.fp8_tf) / 1e6
            compare(bench, f"{name} T={tokens}", run, tries, bound)
            if tokens > 16:
                now = partial(gemm.product, x, w, ws, torch.bfloat16, groups)
                if groups == 1:
                    now = partial(cublas.product, x, packed)
                print(f"{name} T={tokens}: {bench.us(now, 7):8.1f} us as the model runs it now", flush=True)
    chain(bench)
    many(bench)


def chain(bench: Bench) -> None:
    """wo_a and wo_b of Flash one after the other, as in a step: the second's weights come while the first runs."""
    a, b = (gemm_bench.weights(*size, bench.device) for size in ((8192, 4096), (4096, 8192)))
    for tokens in (1, 16, 64):
        x = torch.randn((tokens, 8 * 4096), device=bench.device, dtype=torch.bfloat16)

        def run(x: Tensor = x, tune: dict[str, Any] | None = None) -> Tensor:
            u = gemm.narrow(x, *a, out_dtype=torch.bfloat16, groups=8, tune=tune)
            return gemm.narrow(u, *b, out_dtype=torch.bfloat16, tune=tune)

        bound = 2 * 8192 * 4096 / bench.copy_tb_s / 1e6
        compare(bench, f"Flash wo_a, wo_b T={tokens}", run, list(FEW[:3]), bound)


def many(bench: Bench) -> None:
    """The wide kernel's tiles; the grouped product by cuBLAS group by group."""
    for name in ("Flash wo_a", "Flash wo_b", "Pro wo_a"):
        groups, out, width = gemm_bench.SHAPES[name]
        w, ws = gemm_bench.weights(groups * out, width, bench.device)
        for tokens in (512, 2048, 8192):
            x = torch.randn((tokens, groups * width), device=bench.device, dtype=torch.bfloat16)
            codes, xs = quantise(x, groups)
            run = partial(gemm.wide, codes, w, ws, out_dtype=torch.bfloat16, groups=groups, xs=xs)
            bound = 2 * tokens * w.numel() / bench.fp8_tf / 1e6
            tries = [{"bn": 256, "stages": 3}, {"bn": 256, "stages": 4}]
            compare(bench, f"{name} T={tokens}, quantised before", run, tries, bound)
            alone = bench.us(partial(quantise, x, groups), 7)
            print(f"{name} T={tokens}: {alone:8.1f} us to quantise", flush=True)
            if groups > 1:
                shaped, packed = (
                    x.unflatten(1, (groups, width)),
                    cublas.linear.prepare(Fp8Weight(w, ws, x.dtype)),
                )
                cublas.GROUPED_FEW = 0
                for part in (tokens, 4096, 2048):
                    if part > tokens or (part < tokens and tokens < 8192):
                        continue
                    us = bench.us(partial(_in_parts, shaped, packed, part), 7)
                    print(
                        f"{name} T={tokens}: {us:8.1f} us {bound / us:4.0%} cuBLAS by group, {part} tokens",
                        flush=True,
                    )


def _in_parts(x: Tensor, packed: cublas.Blocks, part: int) -> list[Tensor]:
    return [cublas.grouped_linear(piece, packed) for piece in x.split(part)]


def experts(bench: Bench) -> None:
    count, dim, inner = moe_bench.SHAPES["Flash"]
    model = moe_bench.Experts(count, dim, inner, bench.device)
    for tokens in (1, 8, 128, 512, 2048, 8192):
        x = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
        ids = torch.rand((tokens, count), device=bench.device).topk(moe_bench.TOPK).indices.sort().values
        weights = torch.rand((tokens, moe_bench.TOPK), device=bench.device)
        run = partial(moe.run, x, ids, weights, model.packed, moe_bench.LIMIT, x)
        if tokens <= 8:
            tries = settings(split1=(1, 2, 4, 8), split2=(1, 2, 4), stages=(3, 4, 6))
        elif tokens <= 128:
            tries = settings(stages=(3, 5), absorb=(0, 1))
        else:
            tries = [
                dict(bt=bt, absorb=absorb, warps=warps, stages=stages)
                for bt, absorb, warps, stages in (
                    (16, 0, 4, 4), (16, 1, 4, 4), (32, 0, 4, 3), (32, 1, 4, 2), (32, 1, 4, 3), (32, 1, 4, 4), (32, 1, 8, 3),
                    (64, 1, 4, 2), (64, 1, 4, 3), (64, 1, 8, 2), (64, 1, 8, 3), (64, 1, 8, 4), (128, 1, 8, 3),
                )
            ]  # fmt: skip
        bytes_moved = len(ids.unique()) * (model.packed.nbytes // count) + 6 * x.numel()
        flops = 2 * tokens * moe_bench.TOPK * 3 * dim * inner
        bound = max(bytes_moved / bench.copy_tb_s, flops / bench.fp8_tf) / 1e6
        compare(bench, f"moe T={tokens}", run, tries, bound)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.tune", description=__doc__)
    parser.add_argument("what", nargs="+", choices=("gemm_fp8", "moe"))
    what = parser.parse_args().what
    bench = Bench(quick=True)
    print(
        f"copy {bench.copy_tb_s:.2f} TB/s, bf16 {bench.bf16_tf:.0f} TF, fp8 {bench.fp8_tf:.0f} TF, floor {bench.floor_us:.1f} us"
    )
    for name in what:
        {"gemm_fp8": gemms, "moe": experts}[name](bench)


if __name__ == "__main__":
    main()
