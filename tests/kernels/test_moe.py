"""FP4 experts against a loop over tokens in float32 with the same quantised inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.device import DEVICE, close, on_gpu
from tests.kernels.quantised import EXACT, fp4, roundtrip

pytest.importorskip("triton")

from dsv4.kernels.triton import moe, moe_few, moe_pack
from dsv4.kernels.triton.gemm import counters

LIMIT = 7.0

ONE_LAUNCH = {"tokens": 0}
"""Up to this many tokens `run` takes the form in one launch."""


def run_by_size(x: Tensor, *rest: Any, **tune: Any) -> Tensor:
    return (moe_few.run_few if 0 < len(x) <= ONE_LAUNCH["tokens"] else moe.run)(x, *rest, **tune)


NEAR = EXACT if DEVICE == "cpu" else 6e-3
"""Among many hidden values the GPU's 14 bits round a few to the neighbouring e4m3 code."""


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    count: int, dim: int, inner: int, low: int = 116, high: int = 121
) -> tuple[moe.PackedExperts, tuple[Tensor, ...]]:
    """Packed ones on the device, and w1, w3, w2 in float32."""
    g = _g(count)
    parts = [fp4((count, *shape), g, low, high) for shape in ((inner, dim), (inner, dim), (dim, inner))]
    packed = moe_pack.pack(*(t.to(DEVICE) for codes, scales, _ in parts for t in (codes, scales)))
    return packed, tuple(values for *_, values in parts)


def _expected(
    x: Tensor, experts: Tensor, weights: Tensor, dense: tuple[Tensor, ...], shared: Tensor | None
) -> Tensor:
    w1, w3, w2 = dense
    out = torch.zeros(x.shape) if shared is None else shared.float().clone()
    xq = roundtrip(x)
    for t in range(len(x)):
        for j, e in enumerate(experts[t].tolist()):
            if not 0 <= e < len(w1):
                continue
            a, b = (w1[e] @ xq[t]).clamp(max=LIMIT), (w3[e] @ xq[t]).clamp(-LIMIT, LIMIT)
            out[t] += w2[e] @ roundtrip(torch.nn.functional.silu(a) * b * weights[t, j], 64)
    return out


def check(
    packed: moe.PackedExperts, dense: tuple[Tensor, ...], experts: Tensor, tolerance: float, run: Any = run_by_size, **tune: int
) -> None:  # fmt: skip
    tokens, k = experts.shape
    g = _g(tokens)
    x, weights = torch.randn((tokens, dense[0].shape[2]), generator=g), torch.rand((tokens, k), generator=g)
    shared = torch.randn(x.shape, generator=g) if tokens % 2 else None
    moved = [v.to(DEVICE) for v in (x, experts, weights)]
    there = None if shared is None else shared.to(DEVICE)
    run = partial(run, *moved, packed, LIMIT, there, **({"tune": tune} if tune else {}))
    y = run()
    assert close(y, _expected(x, experts, weights, dense, shared)) < tolerance
    assert torch.equal(y, run())
    assert not counters(y.device).any()


SMALL = make(4, 128, 64)


@pytest.fixture(params=[0, moe_few.FEW], ids=["several launches", "one launch"])
def one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(ONE_LAUNCH, "tokens", request.param)
    return request.param


def test_packing_keeps_size_and_sees_wide_rows() -> None:
    packed, (w1, _, _) = SMALL
    assert (
        packed.absorb and packed.nbytes < 1.1 * 4 * (4 * 128 * 128 // 2) * 33 / 32
    )  # hidden 64 is padded to 128
    codes, scales, _ = fp4((8, 64), _g())
    scales[3] = torch.tensor([100, 112])
    assert not moe_pack.pack_rows(codes[None], scales[None])[3]
    codes[3, :16] = 0x80  # minus zero and zero: their scale does not matter
    assert moe_pack.pack_rows(codes[None], scales[None])[3]
    assert w1.shape == (4, 64, 128)


def test_experts_are_packed_some_at_a_time_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((5, 96, 64), (5, 96, 64), (5, 64, 96))
    stacks = [t for shape in shapes for t in fp4(shape, _g(7))[:2]]
    whole = moe_pack.pack(*stacks)
    monkeypatch.setattr(moe_pack, "_AT_ONCE", 2 * 2 * stacks[0][0].nbytes)  # two at a time, then one
    parts = moe_pack.pack(*stacks)
    for name in ("w13", "s13", "b13", "w2", "s2", "b2"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
        assert not torch.equal(getattr(whole, name)[0], getattr(whole, name)[3]), name
    assert parts.absorb == whole.absorb


@pytest.mark.parametrize(
    ("experts", "tune"),
    [
        ([[2, 0]], {}),
        ([[1, 3]], {"grouped": 0, "bt": 16, "regs": 0, "absorb": 1}),
        ([[1, 3]], {"grouped": 0, "bt": 16, "regs": 0, "absorb": 0}),
        ([[0, 1], [1, 2], [0, 1]], {}),
        ([[3, 1]] * 9, {"absorb": 1}),
    ],
)
def test_equals_the_loop(experts: list[list[int]], tune: dict[str, int], one_launch: int) -> None:
    check(*SMALL, torch.tensor(experts), EXACT if len(experts) <= 8 else 5e-3, **tune)


def test_widths_that_are_no_multiple_and_split_sums(one_launch: int) -> None:
    check(*make(3, 160, 96), torch.tensor([[2, 0]]), EXACT, split1=2)


def test_both_products_split_and_an_expert_of_more_slots_than_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ONE_LAUNCH, "tokens", moe_few.FEW)
    check(*make(2, 160, 288), torch.tensor([[1, 0]]), NEAR, split1=2, split2=3)
    check(*make(2, 512, 256), torch.tensor([[1, 0]]), NEAR, split1=2)
    check(*make(1, 512, 512), torch.tensor([[0]]), NEAR)
    check(*SMALL, torch.tensor([[2, 2, 2], [2, 0, 2]] * 4), NEAR)


@pytest.mark.parametrize("tune", [{}, {"bt": 8}, {"split1": 2}], ids=str)
def test_groups_as_columns(tune: dict[str, int]) -> None:
    """Blocks of an expert that are full, a width that is no whole number of steps, and scales that no table takes."""
    packed, dense = make(2, 288, 192, 106, 120)
    assert not packed.absorb
    ids = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [1, 0]])
    check(packed, dense, ids, NEAR, run=moe.run, **(moe.GROUPED | tune))


def _planned(experts: Tensor, count: int, bt: int, *, alone: bool) -> tuple[Tensor, Tensor]:
    """Rows and plan, by one program or by one for each expert."""
    slots = experts.numel()
    rows, plan = (torch.full((n,), -7, dtype=torch.int32, device=DEVICE) for n in (slots, 3 + 3 * slots))
    x = torch.ones((len(experts), 128), device=DEVICE)
    codes, scales = torch.empty_like(x).to(torch.float8_e4m3fn), torch.zeros((len(x), 1), device=DEVICE)
    moe.plan_kernel[((1 if alone else count) + -(-len(x) // 8),)](
        experts.to(DEVICE), rows, plan, x, codes, scales, slots, count, 128, 1, 128, len(x),
        BINS=moe.next_pow2(count), CHUNK=64, BT=bt, BLOCK=128, PDL=False, ALONE=alone,
    )  # fmt: skip
    assert scales.all() and codes.float().all()
    return rows.cpu(), plan.cpu()


@pytest.mark.parametrize("bt", [2, 16])
@pytest.mark.parametrize(("tokens", "count"), [(1, 8), (21, 5), (21, 40), (20, 3)])
def test_one_program_plans_as_one_for_each_expert(tokens: int, count: int, bt: int) -> None:
    """More slots of an expert than a block has, slots of none, experts of none."""
    experts = torch.randint(0, count + 1, (tokens, 3), generator=_g(tokens))
    experts[::4, 1] = -1
    rows, plan = _planned(experts, count, bt, alone=True)
    assert all(map(torch.equal, (rows, plan), _planned(experts, count, bt, alone=False)))
    flat = experts.flatten().tolist()
    order = [s for e in range(count) for s, chosen in enumerate(flat) if chosen == e]
    blocks = [
        (e, at, min(bt, flat.count(e) - at)) for e in range(count) for at in range(0, flat.count(e), bt)
    ]
    begin = {e: sum(flat.count(other) for other in range(e)) for e in range(count)}
    assert rows.tolist()[: len(order)] == order and int(plan[0]) == len(blocks)
    found = plan[3 : 3 + 3 * len(blocks)].view(-1, 3).tolist()
    assert found == [[e, begin[e] + at, n] for e, at, n in blocks]


def test_no_tokens(one_launch: int) -> None:
    x, experts = torch.empty((0, 128), device=DEVICE), torch.empty((0, 2), dtype=torch.int64, device=DEVICE)
    assert moe.run(x, experts, torch.empty((0, 2), device=DEVICE), SMALL[0], LIMIT, None).shape == (0, 128)


def test_experts_without_tokens_are_not_read(one_launch: int) -> None:
    """Scales of 255 (2^128) in the others give infinity or NaN where they are read."""
    packed, dense = SMALL
    scales = packed.s13.clone()
    scales[[1, 2]] = -1
    poisoned = moe.PackedExperts(packed.w13, scales, packed.b13, packed.w2, packed.s2, packed.b2, 128, True)
    check(poisoned, dense, torch.tensor([[0, 3], [3, 0]]), EXACT)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 33, 128, 300, 1100])
def test_many_tokens_of_few_experts(tokens: int, one_launch: int) -> None:
    """Tiles of 16 to 128 tokens, with and without scales in the table, and all tokens to the same two experts."""
    if one_launch and tokens > moe_few.FEW:
        pytest.skip("the same launches")
    packed, dense = make(8, 1024, 512)
    ids = torch.stack([torch.randperm(8, generator=_g(t))[:6] for t in range(tokens)])
    check(packed, dense, ids, 6e-3)
    check(packed, dense, ids, 6e-3, absorb=0)
    check(packed, dense, torch.tensor([[5, 2]] * tokens), 6e-3)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_one_launch_again_and_again(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several waves of programs, replayed in a graph with other experts each time: the same bits as one by one."""
    monkeypatch.setitem(ONE_LAUNCH, "tokens", moe_few.FEW)
    packed, dense = make(16, 2048, 1024)
    x, weights = torch.randn((tokens, 2048), device=DEVICE), torch.rand((tokens, 6), device=DEVICE)
    ids = torch.stack([torch.randperm(16)[:6] for _ in range(tokens)]).to(DEVICE)
    run_by_size(x, ids, weights, packed, LIMIT, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_by_size(x, ids, weights, packed, LIMIT, x)
    for i in range(50):
        ids.copy_(torch.stack([torch.randperm(16)[:6] for _ in range(tokens)]))
        graph.replay()
        assert torch.equal(y, run_by_size(x, ids, weights, packed, LIMIT, x))
        if i % 25 == 0:
            assert close(y, _expected(*(v.cpu() for v in (x, ids, weights)), dense, x.cpu())) < NEAR
    assert not counters(y.device).any()
