"""Times the products with other settings than the chosen ones: `python3 -m benches.gpu.tune gemm_fp8 moe`. Prints, per
shape, the settings from fast to slow; what wins belongs into the kernel file's own choice."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from dsv4.kernels.triton import gemm, moe
from torch import Tensor

from benches.gpu import gemm_fp8 as gemm_bench
from benches.gpu import moe as moe_bench
from benches.gpu.timing import Bench


def settings(**values: Iterable[int]) -> list[dict[str, int]]:
    """Every combination."""
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]


def compare(
    bench: Bench, label: str, run: Callable[..., Tensor], tries: list[dict[str, int]], bound: float
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


def gemms(bench: Bench) -> None:
    for name in ("Flash wq_a, wkv", "Flash wq_b", "Flash wo_a", "Flash wo_b", "Pro wo_b"):
        groups, out, width = gemm_bench.SHAPES[name]
        w, ws = gemm_bench.weights(groups * out, width, bench.device)
        for tokens in (1, 16, 32):
            x = torch.randn((tokens, groups * width), device=bench.device, dtype=torch.bfloat16)
            run = partial(gemm.narrow, x, w, ws, out_dtype=torch.bfloat16, groups=groups)
            tries = settings(bn=(64, 128), split=(1, 2, 4, 8, 16, 32), stages=(3, 4, 6))
            moved = w.numel() + 2 * x.numel() + 2 * tokens * groups * out
            bound = max(moved / bench.copy_tb_s, 2 * tokens * w.numel() / bench.fp8_tf) / 1e6
            compare(bench, f"{name} T={tokens}", run, tries, bound)


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
