"""Where each role of the experts of a long prefill spends a step: `python3 -m benches.gpu.expert_roles`.

Of each product, by the number of pieces of 64 slots that a tile holds: cycles of the SM's clock a step (128 channels) takes and
what warp 0 of each role does meanwhile (of the expanders, each in its own steps), then what a tile costs besides its steps.
Marks cost a store each; the time of a product with them is therefore printed too.
"""

from __future__ import annotations

import argparse

import torch
from dsv4.kernels.gluon import moe
from dsv4.kernels.gluon.trace import EVENTS, ROLES
from dsv4.kernels.triton.moe_plan import plan_many
from torch import Tensor

from benches.gpu import moe as moe_bench
from benches.gpu.roles import Step, mean, since

EXPAND, LEFT, RIGHT, BRING = (role.value for role in (moe.EXPAND, moe.LEFT, moe.RIGHT, moe.BRING))
STEPS = [
    Step(EXPAND, 0, 1, "expanders wait for a place (taken)"),
    Step(EXPAND, 1, 2, "          wait for copies (loaded)"),
    Step(EXPAND, 2, 3, "          look up, store"),
    Step(EXPAND, 3, 4, "          fence, arrive"),
    Step(BRING, 0, 1, "copies    waits for a buffer (freed)"),
    Step(BRING, 1, 2, "          asks for them"),
    Step(LEFT, 0, 1, "left      waits for copies and weights"),
    Step(LEFT, 1, 2, "          products, scaling (second product: of 64 channels)"),
    Step(RIGHT, 0, 1, "right     waits for copies and weights"),
    Step(RIGHT, 1, 2, "          products, scaling"),
]


def tiles_of(plan: Tensor, tiles: int, programs: int) -> Tensor:
    """Pieces of each tile of each program [programs, tiles of a program], -1 beyond its last."""
    blocks = int(plan[0])
    pieces = (plan[5 : 3 + 3 * blocks : 3] + 63) // 64
    item = torch.arange(programs, device=plan.device)[:, None] + programs * torch.arange(
        -(-blocks * tiles // programs), device=plan.device
    )
    return torch.where(item < blocks * tiles, pieces[(item // tiles).clamp(max=blocks - 1)], -1)


def report(label: str, times: Tensor, pieces: Tensor, steps: int) -> None:
    """times [programs, tiles of a program, steps, ROLES, EVENTS]."""
    print(label)
    turn = torch.arange(pieces.shape[1] * steps, device=times.device) % moe.EVERY.value
    of_second = (turn == moe.EVERY.value - 1).view(-1, steps).expand(len(pieces), -1, -1)
    for p in sorted(set(pieces.flatten().tolist()) - {-1, 0}):
        at = times[pieces == p][:4096].long()
        last, end = at[:, :, EXPAND, 4], at[:, -1]
        print(
            f"  {p} pieces, {int((pieces == p).sum())} tiles: a step {mean(since(last[:, :-1], last[:, 1:]))}"
        )
        for step in STEPS:
            if step.role != RIGHT or p > 1:
                took = since(at[:, 1:, step.role, step.first], at[:, 1:, step.role, step.last])
                other = of_second[pieces == p][:4096, 1:]
                parts = (took[~other], took[other]) if step.role == EXPAND else (took,)
                print(f"    {step.what:56}" + ", second ".join(mean(t.flatten()[: 1 << 20]) for t in parts))
        print(f"    left's end of a tile: {mean(since(end[:, LEFT, 3], end[:, LEFT, 7]))}")
    ok = (pieces[:, :-1] > 0) & (pieces[:, 1:] > 0)
    before, after = times[:, :-1, -1][ok].long(), times[:, 1:, 0][ok].long()
    for role, first, name in ((EXPAND, 4, "expanders"), (BRING, 2, "copies"), (LEFT, 2, "left")):
        second = 1 if role == LEFT else first
        print(f"  {name} from a tile's last step to the next one's first: "
              f"{mean(since(before[:, role, first], after[:, role, second]))}")  # fmt: skip


def run(name: str, tokens: int) -> None:
    count, dim, inner = moe_bench.SHAPES[name]
    torch.manual_seed(0)
    model = moe_bench.Experts(count, dim, inner, torch.device("cuda"))
    gate = torch.randn((count, dim), device="cuda", dtype=torch.bfloat16) / dim**0.5
    bias = torch.randn(count, device="cuda") / 10
    x = torch.randn((tokens, dim), device="cuda", dtype=torch.bfloat16)
    experts, weights = moe_bench.route(x, gate, bias, None, moe_bench.TOPK, 1.5)
    plan = plan_many(experts, count, 256, 64)[2]
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = (model.packed.w13.shape[1], model.packed.w2.shape[1])
    steps = (dim // 128, tiles[0] // 2)
    pieces = [tiles_of(plan, n, programs) for n in tiles]
    times = tuple(
        torch.zeros((programs, p.shape[1] * n, ROLES, EVENTS), dtype=torch.int32, device="cuda")
        for p, n in zip(pieces, steps, strict=True)
    )
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        moe.run(x, experts, weights, model.packed, moe_bench.LIMIT, x, times=times)
        end.record()
    torch.cuda.synchronize()
    print(
        f"{name}, {tokens} tokens: {int(plan[0])} blocks, {start.elapsed_time(end) * 1e3:.0f} us with marks"
    )
    for i, what in enumerate(("first product", "second product")):
        at = times[i].view(programs, pieces[i].shape[1], steps[i], ROLES, EVENTS)
        report(f" {what}, {steps[i]} steps a tile", at, pieces[i], steps[i])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu.expert_roles", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=tuple(moe_bench.SHAPES), default=["Flash"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    args = parser.parse_args()
    for name in args.models:
        for tokens in args.tokens:
            run(name, tokens)


if __name__ == "__main__":
    main()
