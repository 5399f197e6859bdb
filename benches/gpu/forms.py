"""The forms of sparse attention on Hopper that are on trial, in one run: `python3 -m benches.gpu.forms [--check FORM]`.

Prints microseconds of each form beside FlashMLA's, then the roles of the forms in prefill. `--check FORM` runs the tests of
the Gluon kernel on one form. To be deleted when one form is left.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from dsv4.kernels.gluon import attention

from benches.gpu.attention import MODELS, _peer, _prefill_peer, inputs
from benches.gpu.roles import report, run
from benches.gpu.timing import Bench

FORMS = (0, 1, 2)


class Timer(Bench):
    """A bench that does not measure the machine first."""

    def __init__(self) -> None:
        self.repeats = 7
        self._flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")


def line(bench: Bench, label: str, x: Any, peer: Any) -> None:
    results, times = [], []
    for form in FORMS:
        attention.FORM = form
        results.append(attention.sparse_attention(**x.args).float())
        times.append(bench.us(lambda: attention.sparse_attention(**x.args)))
    far = [f"{float((r - results[0]).abs().max()):.1e}" for r in results[1:]]
    other = bench.us(peer) if peer else float("nan")
    ratios = ", ".join(f"form {f} {t:.1f} us {t / other:.2f}" for f, t in zip(FORMS, times, strict=True))
    print(f"{label}: FlashMLA {other:.1f} us; {ratios}; off form 0 by {', '.join(far)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches.gpu.forms", description=__doc__.split("\n")[0])
    parser.add_argument("--check", type=int, choices=FORMS)
    parser.add_argument("--roles", action="store_true", help="only the roles, of every form")
    args = parser.parse_args()
    if args.check is not None:
        import pytest

        attention.FORM = args.check
        return pytest.main(["-q", "-x", "tests/kernels/test_attention.py", "-k", "gluon or times_of"])
    if args.roles:
        for form in FORMS:
            attention.FORM = form
            for model, tokens, chunk in (("flash", 1056, True), ("flash", 256, False), ("pro", 528, True)):
                label = f"form {form}, {model} {'prefill' if chunk else 'decode'}, {tokens} tokens"
                report(label, *run(model, tokens, chunk))
        return 0
    bench = Timer()
    for model, (heads, k) in MODELS.items():
        x = inputs(heads, k, 4096, 8192, chunk=True)
        line(bench, f"{model} prefill 4096", x, _prefill_peer(x))
        for batch in (32, 128, 256):
            x = inputs(heads, k, batch, 8192)
            line(bench, f"{model} decode {batch}", x, _peer(x))
        bench.free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
