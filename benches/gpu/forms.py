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
    parser.add_argument("--compile", type=int, metavar="SHAPE", help="only run one of the shapes once")
    args = parser.parse_args()
    if args.compile is not None:
        model, tokens, chunk = SHAPES[args.compile]
        x = inputs(*MODELS[model], min(tokens, 256), 1024, chunk=chunk)
        for form in args.forms:
            sparse_attention(**x.args, form=form)
        return
    command = [sys.executable, "-m", "benches.gpu.forms", "--compile"]
    for process in [  # all at once; then the kernels are in the cache
        subprocess.Popen([*command, str(shape), str(form)]) for form in args.forms for shape in (0, 1, 2)
    ]:
        process.wait()
    bench = Timer()
    for model, tokens, chunk in SHAPES:
        x = inputs(*MODELS[model], tokens, 8192, chunk=chunk)
        peer = _prefill_peer(x) if chunk else _peer(x)
        line(bench, f"{model} {'prefill' if chunk else 'decode'} {tokens}", x, peer, args.forms)
    form = 2 if 2 in args.forms else args.forms[-1]
    report(f"form {form}, flash-prefill, 1056 tokens", *run("flash", 1056, True, form))


if __name__ == "__main__":
    main()
