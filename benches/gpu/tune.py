"""Times the products with other settings than the chosen ones: `python3 -m benches.gpu.tune gemm_fp8 moe decode`. Prints, per
shape, the settings from fast to slow; what wins belongs into the kernel file's own choice."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from dsv4.kernels.triton import gemm, moe, moe_few
from dsv4.kernels.triton.forms import ONE_LAUNCH
from torch import Tensor

from benches.gpu import gemm_fp8 as gemm_bench
from benches.gpu import moe as moe_bench
from benches.gpu.timing import Bench, max_abs_err


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


def decode_tries(tokens: int) -> list[tuple[str, dict[str, int]]]:
    """(form, settings) of decode steps, each form's own choice first."""
    several: list[dict[str, int]] = [{}]
    if tokens <= 128:
        several += [
            moe.GROUPED | more
            for more in (dict(stages=3), dict(regs=0), dict(split1=2), dict(bt=8, regs=128))
        ]
    if tokens >= 64:
        absorbed = dict(grouped=0, absorb=1, bt=16, warps=4, regs=0)
        several += [
            absorbed | more
            for more in (
                dict(stages=3),
                dict(stages=4),
                dict(stages=5),
                dict(stages=4, regs=112),
                dict(stages=3, bt=32),
                dict(stages=3, bt=32, regs=168),
            )
        ]
    one = [
        {},
        dict(stages=3),
        dict(regs=0),
        dict(regs=96),
        dict(split1=8),
        dict(split1=4, split2=2),
        dict(split1=2, split2=2),
    ]
    tries = [("several", tune) for tune in several]
    return tries + ([("one", tune) for tune in one] if tokens * moe_bench.TOPK <= 2 * ONE_LAUNCH else [])  # fmt: skip


DECODERS = {"several": moe.run, "one": moe_few.run_few}
"""Forms of decode steps."""


def _flash(device: torch.device) -> tuple[moe_bench.Experts, Tensor]:
    """Experts of Flash, and a router."""
    count, dim, inner = moe_bench.SHAPES["Flash"]
    model = moe_bench.Experts(count, dim, inner, device)
    return model, torch.randn((count, dim), device=device, dtype=torch.bfloat16) / dim**0.5


def decode(bench: Bench, tokens: Iterable[int]) -> None:
    """Decode steps of unevenly routed experts, by time."""
    model, gate = _flash(bench.device)
    for n in tokens:
        torch.manual_seed(n)
        made = moe_bench.step(n, gate)
        hit, size = moe_bench.step_bytes(made, model.packed)
        last = slice(n - min(n, 16), None)
        expected, found = model.expected(*(t[last] for t in made[0])), []
        runs = [
            (f"{name} {tune or 'as chosen'}", partial(DECODERS[name], **({"tune": tune} if tune else {})))
            for name, tune in decode_tries(n)
        ]
        for label, form in runs:
            try:
                y = moe_bench.run_step(made, model.packed, form)[0]
                error = max_abs_err(y[last], expected) / float(expected.abs().max())
                us = bench.us(partial(moe_bench.run_step, made, model.packed, form), 7) / len(made)
                found.append((us, error, label))
            except (
                Exception
            ) as e:  # too much shared memory, or a compiler that gives up: a result like any other
                print(f"{n} tokens, {label}: {type(e).__name__} {str(e)[:100]}")
        bound = size / bench.copy_tb_s / 1e6
        print(
            f"{n} tokens, {hit:.1f} experts hit, {size / 1e6:.0f} MB, {bound:.1f} us by copy rate", flush=True
        )
        for us, error, label in sorted(found):
            print(f"  {us:7.1f} us {bound / us:4.0%} error {error:.1e} {label}", flush=True)
    bench.free()


def _compiled(place: int, of: int, tokens: list[int]) -> None:
    """Every of-th setting once."""
    model, gate = _flash(torch.device("cuda"))
    each = [(n, name, tune) for n in tokens for name, tune in decode_tries(n)]
    for n, name, tune in each[place::of]:
        try:
            moe_bench.run_step(moe_bench.step(n, gate, 1), model.packed, partial(DECODERS[name], tune=tune))
            torch.cuda.synchronize()
        except Exception as e:  # said again where it is timed
            print(f"{n} tokens, {name} {tune}: {type(e).__name__}")


def compile_all(tokens: list[int], at_once: int) -> None:
    """What `decode` times into Triton's cache, so many processes at a time."""
    torch.multiprocessing.spawn(_compiled, (at_once, tokens), nprocs=at_once)


def experts(bench: Bench) -> None:
    count, dim, inner = moe_bench.SHAPES["Flash"]
    model = moe_bench.Experts(count, dim, inner, bench.device)
    for tokens in (512, 1024, 2048, 8192):
        x = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
        ids = torch.rand((tokens, count), device=bench.device).topk(moe_bench.TOPK).indices.sort().values
        weights = torch.rand((tokens, moe_bench.TOPK), device=bench.device)
        run = partial(moe.run, x, ids, weights, model.packed, moe_bench.LIMIT, x)
        tries = [
            dict(bt=bt, absorb=absorb, warps=warps, stages=stages, regs=0)
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
    parser.add_argument("what", nargs="+", choices=("gemm_fp8", "moe", "decode"))
    parser.add_argument("--tokens", type=int, nargs="+", default=moe_bench.DECODED, help="of decode")
    parser.add_argument(
        "--compile", type=int, default=0, help="so many processes compile decode's settings first"
    )
    args = parser.parse_args()
    what = args.what
    if args.compile:
        compile_all(args.tokens, args.compile)
    bench = Bench(quick=True)
    print(
        f"copy {bench.copy_tb_s:.2f} TB/s, bf16 {bench.bf16_tf:.0f} TF, fp8 {bench.fp8_tf:.0f} TF, floor {bench.floor_us:.1f} us"
    )
    for name in what:
        {"gemm_fp8": gemms, "moe": experts, "decode": partial(decode, tokens=args.tokens)}[name](bench)


if __name__ == "__main__":
    main()
