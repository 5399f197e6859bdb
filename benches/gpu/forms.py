"""The forms of sparse attention on Hopper that are on trial, in one run: `python3 -m benches.gpu.forms [FORM ...]`.

Prints microseconds of each form beside FlashMLA's, and at last the fastest of those that are right (mean of the logarithms)
for decode and for prefill, as attention.py names them: `FORM = (3, 0)`. With --roles also where the roles of the last form
spend a block. To be deleted when one form is left.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from dsv4.kernels.gluon.attention import sparse_attention

from benches.gpu.attention import MODELS, _peer, _prefill_peer, inputs
from benches.gpu.roles import report, run
from benches.gpu.timing import Bench

SHAPES = [("flash", 4096, True), ("pro", 4096, True), ("flash", 8, False)]
SHAPES += [(model, tokens, False) for model in MODELS for tokens in (128, 256)]
TOLERANCE, GAIN = 4e-3, 0.99
"""||difference from the first form|| / ||its result|| of a form that is right; time over the first form's that is faster."""


class Timer(Bench):
    """A bench that does not measure the machine first."""

    def __init__(self) -> None:
        self.repeats = 9
        self._flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")


def line(bench: Bench, label: str, x: Any, peer: Any, forms: list[int]) -> tuple[list[float], list[bool]]:
    """Prints a shape's line; (time of each form over the first's, whether it is right)."""
    times = [bench.us(partial(sparse_attention, **x.args, form=form)) for form in forms]
    first, far = sparse_attention(**x.args, form=forms[0]).float(), []
    for form in forms[1:]:
        far.append(float((sparse_attention(**x.args, form=form).float() - first).norm() / first.norm()))
    other = bench.us(peer) if peer else float("nan")
    ratios = ", ".join(f"form {f} {t:.1f} us {t / other:.2f}" for f, t in zip(forms, times, strict=True))
    off = ", ".join(f"{e:.1e}" for e in far)
    print(f"{label}: FlashMLA {other:.1f} us; {ratios}; off form {forms[0]} by {off}", flush=True)
    return [t / times[0] for t in times], [True, *(e <= TOLERANCE for e in far)]


def choose(forms: list[int], lines: list[tuple[list[float], list[bool]]]) -> int:
    """The fastest right form; the first one unless another gains."""
    best, chosen = math.log(GAIN), forms[0]
    for i, form in enumerate(forms):
        mean = sum(math.log(ratios[i]) for ratios, _ in lines) / len(lines)
        if mean < best and all(right[i] for _, right in lines):
            best, chosen = mean, form
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.forms", description=__doc__.split("\n")[0])
    parser.add_argument("forms", nargs="*", type=int, default=[0, 2, 3, 5, 6])
    parser.add_argument("--roles", action="store_true", help="and the roles of the last form")
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
    bench, lines = Timer(), {False: [], True: []}
    for model, tokens, chunk in SHAPES:
        x = inputs(*MODELS[model], tokens, 8192, chunk=chunk)
        peer = _prefill_peer(x) if chunk else _peer(x)
        label = f"{model} {'prefill' if chunk else 'decode'} {tokens}"
        lines[chunk].append(line(bench, label, x, peer, args.forms))
    if args.roles:
        report(
            f"form {args.forms[-1]}, flash-prefill, 1056 tokens", *run("flash", 1056, True, args.forms[-1])
        )
    print(f"FORM = ({choose(args.forms, lines[False])}, {choose(args.forms, lines[True])})")


if __name__ == "__main__":
    main()
