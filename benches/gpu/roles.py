"""Where each role of sparse attention on Hopper spends a block: `python3 -m benches.gpu.roles [--tokens N] [SHAPE ...]`.

Prints cycles of the SM's clock, the mean over CTAs and blocks but each CTA's first two and last, of warp 0 of each role;
then a CTA's start and end. Marks cost a store each; the time of a block with them is therefore printed too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from dsv4.backends import REGISTRY
from dsv4.kernels.gluon import trace
from dsv4.kernels.gluon.trace import EVENTS, ROLES
from dsv4.kernels.triton.attention import max_blocks
from dsv4.kernels.triton.common import next_pow2
from torch import Tensor

from benches.gpu.attention import MODELS, inputs

SCORES, LEFT, RIGHT, ROWS = (role.value for role in (trace.SCORES, trace.LEFT, trace.RIGHT, trace.ROWS))


@dataclass(frozen=True, slots=True)
class Step:
    """What a role does between two of its events."""

    role: int
    first: int
    last: int
    what: str


STEPS = [
    Step(SCORES, 0, 1, "scores    waits for rows (full)"),
    Step(SCORES, 1, 2, "          Q K^T"),
    Step(SCORES, 2, 3, "          softmax"),
    Step(SCORES, 3, 4, "          waits for P's place (pempty)"),
    Step(SCORES, 4, 5, "          stores P, fence, arrive"),
    Step(LEFT, 0, 1, "left      waits for P (pfull)"),
    Step(LEFT, 1, 2, "          scales, P V"),
    Step(LEFT, 2, 3, "          arrives"),
    Step(RIGHT, 0, 1, "right     waits for P (pfull)"),
    Step(RIGHT, 1, 2, "          scales, P V"),
    Step(RIGHT, 2, 3, "          arrives"),
    Step(ROWS, 0, 1, "rows      prefetch, places"),
    Step(ROWS, 1, 2, "          waits for a buffer (empty)"),
    Step(ROWS, 2, 3, "          converts, stores, loads"),
    Step(ROWS, 3, 4, "          fence"),
    Step(ROWS, 4, 5, "          arrive"),
]


def run(model: str, tokens: int, chunk: bool) -> tuple[Tensor, Tensor]:
    """(each CTA's own times [CTAs, ROLES, EVENTS], its blocks' [CTAs, blocks, ROLES, EVENTS]), int64 on the CPU."""
    heads, k = MODELS[model]
    x = inputs(heads, k, tokens, 8192, chunk=chunk)
    blocks = max_blocks(x.window_ids, x.args["entries"], x.args["selected"], 64)
    room = next_pow2(blocks)
    times = torch.zeros((tokens * heads // 64, 1 + room, ROLES, EVENTS), dtype=torch.int32, device="cuda")
    for _ in range(2):
        REGISTRY.load("sparse_attention", "gluon")(**x.args, splits=1, times=times)
    torch.cuda.synchronize()
    times = times.long().cpu()
    return times[:, 0], times[:, 1 : 1 + blocks]


def since(a: Tensor, b: Tensor) -> Tensor:
    """b - a of a clock of 32 bits; less than nothing if b came first."""
    return ((b - a + (1 << 31)) % (1 << 32) - (1 << 31)).double()


def mean(a: Tensor) -> str:
    """The mean, and where four fifths lie."""
    return f"{a.mean():7.0f}  ({a.quantile(0.1):.0f} to {a.quantile(0.9):.0f})"


def turns(ctas: Tensor) -> tuple[Tensor, Tensor]:
    """Cycles from the beginning of a CTA's item (and from its end, its last role's) to the beginning of the next on the
    same SM."""
    sm, begin = ctas[:, SCORES, 7], ctas[:, SCORES, 6]
    length = torch.stack([since(begin, ctas[:, role, 3]) for role in range(ROLES)]).amax(0)
    from_begin, from_end = [], []
    for one in sm.unique():
        at = (sm == one).nonzero().flatten()
        start = since(begin[at[0]], begin[at])
        order = start.argsort()
        from_begin.append(start[order].diff())
        from_end.append(from_begin[-1] - length[at][order][:-1])
    return torch.cat(from_begin), torch.cat(from_end)


def report(label: str, ctas: Tensor, blocks: Tensor) -> None:
    middle = blocks[:, 2:-1] if blocks.shape[1] > 4 else blocks
    period = since(blocks[:, 2, ROWS, 5], blocks[:, -1, ROWS, 5]).mean() / (blocks.shape[1] - 3)
    print(f"{label}: {len(ctas)} CTAs, a block every {period:.0f} cycles")
    for step in STEPS:
        took = since(middle[:, :, step.role, step.first], middle[:, :, step.role, step.last])
        print(f"  {step.what:40}{mean(took)}")
    start = ctas[:, SCORES, 6]
    print("  from a CTA's beginning: " + ", ".join(
        f"{what} {since(start, at).mean():.0f}"
        for what, at in (
            ("q stored", ctas[:, SCORES, 1]),
            ("rows' places known", ctas[:, ROWS, 1]),
            ("first rows", blocks[:, 0, ROWS, 5]),
            ("second", blocks[:, 1, ROWS, 5]),
            ("first P", blocks[:, 0, SCORES, 5]),
            ("last rows", blocks[:, -1, ROWS, 5]),
            ("last P V", ctas[:, LEFT, 2]),
            ("end", torch.maximum(ctas[:, LEFT, 3] - start, ctas[:, RIGHT, 3] - start) + start),
        )
    ))  # fmt: skip
    whole, between = turns(ctas)
    if len(whole):
        print(
            f"  from beginning to beginning: {whole.median():.0f}, from end to beginning: {between.median():.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.roles", description=__doc__.split("\n")[0])
    names = [f"{model}-{kind}" for model in MODELS for kind in ("prefill", "decode")]
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"default all: {', '.join(names)}")
    parser.add_argument("--tokens", type=int, default=0, help="default 1056 in prefill, 256 in decode")
    args = parser.parse_args()
    if unknown := sorted(set(args.shapes) - set(names)):
        parser.error(f"SHAPE names {', '.join(unknown)}; known: {', '.join(names)}")
    for name in args.shapes or names:
        model, kind = name.split("-")
        tokens = args.tokens or (1056 if kind == "prefill" else 256)
        report(f"{name}, {tokens} tokens", *run(model, tokens, kind == "prefill"))


if __name__ == "__main__":
    main()
