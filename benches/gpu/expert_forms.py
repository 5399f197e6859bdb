"""Forms of the experts of a long prefill that are on trial, in one run: `python3 -m benches.gpu.expert_forms`.

A form is (EVERY, LEAN) of `kernels/gluon/moe.py`; each must give the first one's bits. To be deleted when one form is left.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

import torch
from dsv4.kernels.gluon import moe
from dsv4.kernels.triton.route import route
from torch import Tensor

from benches.gpu import moe as moe_bench
from benches.gpu.breakdown import launches
from benches.gpu.timing import Bench

FORMS = [(0, False), (0, True), (2, True), (3, True)]
SHAPES = [("Flash", 8192), ("Flash", 2048), ("Pro", 8192)]


def run(form: tuple[int, bool], *args: object) -> Tensor:
    moe.EVERY, moe.LEAN = form
    return moe.run(*args)


def inputs(name: str, tokens: int, count: int) -> tuple:
    _, dim, inner = moe_bench.SHAPES[name]
    model = moe_bench.Experts(count, dim, inner, torch.device("cuda"))
    gate = torch.randn((count, dim), device="cuda", dtype=torch.bfloat16) / dim**0.5
    x = torch.randn((tokens, dim), device="cuda", dtype=torch.bfloat16)
    ids, weights = route(x, gate, torch.randn(count, device="cuda") / 10, None, moe_bench.TOPK, 1.5)
    return x, ids, weights, model.packed, moe_bench.LIMIT, x


def compile_all() -> None:
    """Each form's kernels in a process of its own; then they are in the cache."""
    command = [sys.executable, "-m", "benches.gpu.expert_forms", "--compile"]
    started = [
        subprocess.Popen([*command, name, str(i)]) for name in moe_bench.SHAPES for i in range(len(FORMS))
    ]
    for process in started:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.expert_forms", description=__doc__.split("\n")[0])
    parser.add_argument("--compile", nargs=2, metavar=("MODEL", "FORM"), help="only run a form once")
    args = parser.parse_args()
    if args.compile:
        run(FORMS[int(args.compile[1])], *inputs(args.compile[0], 64, 8))
        return torch.cuda.synchronize()
    compile_all()
    bench = Bench(quick=True)
    print(
        f"{torch.cuda.get_device_name()}: FP8 {bench.fp8_tf:.0f} TFLOP/s, copy {bench.copy_tb_s:.2f} TB/s",
        flush=True,
    )
    for name, tokens in SHAPES:
        torch.manual_seed(0)
        call = inputs(name, tokens, moe_bench.SHAPES[name][0])
        flops = 6 * call[0].numel() * moe_bench.TOPK * moe_bench.SHAPES[name][2]
        expected = run(FORMS[0], *call)
        for form in FORMS:
            same = all(torch.equal(run(form, *call), expected) for _ in range(3))
            each = [(kernel, bench.us(launch)) for kernel, _, launch in launches(partial(run, form, *call))]
            us = bench.us(partial(run, form, *call))
            print(f"{name} {tokens} {form}: {us:.0f} us {flops / us / bench.fp8_tf / 1e6:.0%} {'same bits' if same else 'DIFFERS'}: "
                  + ", ".join(f"{kernel.removesuffix('_kernel')} {t:.0f}" for kernel, t in each), flush=True)  # fmt: skip
        del call, expected
        bench.free()


if __name__ == "__main__":
    main()
