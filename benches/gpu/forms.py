"""The forms of sparse attention on Hopper that are on trial, in one run: `python3 -m benches.gpu.forms [FORM ...]`.

Prints microseconds of each form beside FlashMLA's, then the roles of the last form that CTAs stay in. To be deleted when one
form is left.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from dsv4.kernels.gluon.attention import sparse_attention

from benches.gpu.attention import MODELS, _peer, _prefill_peer, inputs
from benches.gpu.roles import report, run
from benches.gpu.timing import Bench

SHAPES = [("flash", 4096, True), ("pro", 4096, True)] + [("flash", n, False) for n in (1, 8, 128, 256)]


class Timer(Bench):
    """A bench that does not measure the machine first."""

    def __init__(self) -> None:
        self.repeats = 7
        self._flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")


def line(bench: Bench, label: str, x: Any, peer: Any, forms: list[int]) -> None:
    results, times = [], []
    for form in forms:
        results.append(sparse_attention(**x.args, form=form).float())
        times.append(bench.us(partial(sparse_attention, **x.args, form=form)))
    far = [f"{float((r - results[0]).abs().max()):.1e}" for r in results[1:]]
    other = bench.us(peer) if peer else float("nan")
    ratios = ", ".join(f"form {f} {t:.1f} us {t / other:.2f}" for f, t in zip(forms, times, strict=True))
    print(f"{label}: FlashMLA {other:.1f} us; {ratios}; off form {forms[0]} by {', '.join(far)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.forms", description=__doc__.split("\n")[0])
    parser.add_argument("forms", nargs="*", type=int, default=[0, 4, 1, 2, 3])
    parser.add_argument("--compile", action="store_true", help="run every shape once and print nothing")
    args = parser.parse_args()
    if not args.compile:  # at once, so that the kernels are in the cache
        command = [sys.executable, "-m", "benches.gpu.forms", "--compile"]
        for process in [subprocess.Popen([*command, str(form)]) for form in args.forms]:
            process.wait()
    bench = None if args.compile else Timer()
    for model, tokens, chunk in SHAPES:
        heads, k = MODELS[model]
        x = inputs(heads, k, 256 if args.compile and chunk else tokens, 8192, chunk=chunk)
        if bench is None:
            for form in args.forms:
                sparse_attention(**x.args, form=form)
            continue
        peer = _prefill_peer(x) if chunk else _peer(x)
        line(bench, f"{model} {'prefill' if chunk else 'decode'} {tokens}", x, peer, args.forms)
    if bench is not None:
        form = 2 if 2 in args.forms else args.forms[-1]
        report(f"form {form}, flash-prefill, 1056 tokens", *run("flash", 1056, True, form))


if __name__ == "__main__":
    main()
