"""FP4 experts against a loop over tokens in float32 with the same quantised inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.device import DEVICE, close, on_gpu
from tests.kernels.quantised import EXACT, codes_of, fp4, roundtrip

pytest.importorskip("triton")

from dsv4.backends import REGISTRY
from dsv4.engine.warmup import _lengths
from dsv4.kernels.triton import gemm, moe, moe_few, moe_pack
from dsv4.kernels.triton.fits import few_experts
from dsv4.kernels.triton.forms import ONE_LAUNCH
from dsv4.kernels.triton.gemm import counters
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import Parallel
from dsv4.ops.forms import Machine
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import dispatcher
from dsv4.plan.workspace import MULTIPROCESSORS, Limits, workspace

LIMIT = 7.0

TAKEN = {"slots": 0}
"""Up to this many slots `run_by_size` takes the form in one launch."""


def run_by_size(x: Tensor, experts: Tensor, *rest: Any, **tune: Any) -> Tensor:
    return (moe_few.run_few if 0 < experts.numel() <= TAKEN["slots"] else moe.run)(x, experts, *rest, **tune)


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


@pytest.fixture(params=[0, ONE_LAUNCH], ids=["several launches", "one launch"])
def one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(TAKEN, "slots", request.param)
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


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("tokens", "dim"), [(3, 256), (9, 160), (9, 256)])
def test_codes_give_the_bits_of_their_values(
    tokens: int, dim: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `fixed` in another order of channels where these are whole blocks; plans by one program and by several. Of values in bfloat16, whose
    result is too."""
    monkeypatch.setattr(moe, "ALONE", 8)
    packed, _ = make(2, dim, 64)
    g = _g(tokens)
    x, weights = torch.randn((tokens, dim), generator=g).bfloat16(), torch.rand((tokens, 2), generator=g)
    ids = torch.tensor([[0, 1], [1, 0], [1, -1]] * tokens)[:tokens]
    x, ids, weights = (v.to(DEVICE) for v in (x, ids, weights))
    expected, found = (moe.run(v, ids, weights, packed, LIMIT, x, fixed=fixed) for v in (x, codes_of(x)))
    assert found.dtype == x.dtype and torch.equal(found, expected)


def test_codes_alone_take_no_form_that_quantises() -> None:
    x, ids = torch.ones((1, 128), device=DEVICE), torch.zeros((1, 1), dtype=torch.int64)
    codes = codes_of(x)
    assert few_experts(x, ids) and few_experts(Quantised.of(x, codes.codes, codes.scales), ids)
    assert not few_experts(codes, ids)


def test_widths_that_are_no_multiple_and_split_sums(one_launch: int) -> None:
    check(*make(3, 160, 96), torch.tensor([[2, 0]]), EXACT, split1=2)


def test_both_products_split_and_an_expert_of_more_slots_than_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TAKEN, "slots", ONE_LAUNCH)
    check(*make(2, 160, 288), torch.tensor([[1, 0]]), NEAR, split1=2)
    check(*make(2, 512, 256), torch.tensor([[1, 0]]), NEAR, split1=2)
    check(*make(1, 512, 512), torch.tensor([[0]]), NEAR)
    check(*SMALL, torch.tensor([[2, 2, 2], [2, 0, 2]] * 4), NEAR)
    ids = torch.stack([torch.randperm(4, generator=_g(t))[:3] for t in range(16)])
    check(*make(4, 288, 96), ids, NEAR)  # 48 slots, and tokens whose experts end in different blocks


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


def _of_shape(count: int, dim: int, inner: int) -> moe.PackedExperts:
    """Without memory."""
    tiles1, steps1, tiles2, steps2 = inner // 64, dim // 128, -(-dim // 128), -(-inner // 128)
    u8, i32 = (partial(torch.empty, dtype=dtype, device="meta") for dtype in (torch.uint8, torch.int32))
    w13, w2 = u8((count, tiles1, 2 * steps1, 128, 32)), u8((count, tiles2, 2 * steps2, 128, 32))
    s13, s2 = i32((count, tiles1, steps1, 128)), i32((count, tiles2, steps2, 128))
    return moe.PackedExperts(
        w13, s13, u8((count, tiles1, 128)), w2, s2, u8((count, tiles2, 128)), inner, True
    )


def _launched(monkeypatch: pytest.MonkeyPatch, packed: moe.PackedExperts, tokens: int, k: int) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """Arguments of `few_kernel` of so many tokens."""
    found: list[Any] = []
    launch = {"__getitem__": lambda self, grid: lambda *args, **constants: found.append((args, constants))}
    monkeypatch.setattr(moe_few, "few_kernel", type("Launch", (), launch)())
    x = torch.empty((tokens, packed.w2.shape[1] * 128), dtype=torch.bfloat16, device="meta")
    experts = torch.empty((tokens, k), dtype=torch.int64, device="meta")
    moe_few.run_few(x, experts, experts.float(), packed, LIMIT, x)
    return found[0]


@pytest.mark.parametrize(
    ("tokens", "k", "form", "fixed"),
    [
        (1, 6, "one", "one"), (2, 6, "one", "several"), (16, 6, "one", "several"), (17, 6, "several", "several"),
        (12, 8, "one", "several"), (13, 8, "several", "several"), (0, 6, "several", "several"),
    ],
)  # fmt: skip
def test_what_takes_one_launch(
    tokens: int, k: int, form: str, fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 16 tokens of six experts, and not one of 17; with `--deterministic` one token where Gluon's bits can be had."""
    called: list[tuple[str, bool]] = []
    monkeypatch.setattr(moe_few, "run_few", lambda *args, fixed: called.append(("one", fixed)))
    monkeypatch.setattr(moe, "run", lambda *args, fixed: called.append(("several", fixed)))
    ids = torch.zeros((tokens, k), dtype=torch.int64)
    for deterministic, dim, expected in (
        (False, 128, form),
        (False, 160, form),
        (True, 128, fixed),
        (True, 160, "several"),
    ):
        chain = REGISTRY.chain("experts", "gluon,triton", Machine("cuda", 9), deterministic=deterministic)
        dispatcher("experts", chain)(torch.empty((tokens, dim)), ids, ids.float(), SMALL[0], LIMIT, None)
        assert called.pop() == (expected, deterministic) and not called


def test_settings_of_the_form_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8 tokens on five programs a multiprocessor; K is split where there are few."""
    monkeypatch.setattr(gemm, "multiprocessors", lambda: 132)
    flash, found = _of_shape(256, 4096, 2048), {}
    for tokens in range(1, 17):
        _, c = _launched(monkeypatch, flash, tokens, 6)
        found[tokens] = (c["STAGES"], c["maxnreg"], c["SPLIT1"], c["SPLIT2"])
    assert found == {t: (4, 96 if t >= 8 else None, *[{1: 4, 2: 2}.get(t, 1)] * 2) for t in range(1, 17)}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("dim", "inner", "k"), [(4096, 2048, 6), (7168, 3072, 6), (4096, 2048, 8), (256, 128, 2)])  # fmt: skip
def test_a_start_compiles_one_launch_for_any_number_of_tokens(
    dim: int, inner: int, k: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has steps of some numbers of tokens; experts are cut by column over ranks."""
    monkeypatch.setattr(gemm, "multiprocessors", lambda: 132)
    packed = _of_shape(8, dim, max(128, inner // ranks))
    kernel = lambda n: tuple(sorted((name, str(v)) for name, v in _launched(monkeypatch, packed, n, k)[1].items()))  # noqa: E731  # fmt: skip
    most = ONE_LAUNCH // k
    assert {kernel(n) for n in range(1, most + 1)} <= {kernel(n) for n in _lengths(4096) if n <= most}


@pytest.mark.parametrize("model", ["v4-flash", "v4-pro"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_plan_counts_what_one_launch_takes(
    model: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "multiprocessors", lambda: MULTIPROCESSORS)
    c = ModelConfig.preset(model)
    packed = _of_shape(8, c.hidden_size, c.moe_intermediate_size // ranks)
    layout = c.layout("fp8_ds_mla", "mxfp4", ranks=ranks)
    for tokens in range(1, ONE_LAUNCH // c.experts_per_token + 1):
        args, _ = _launched(monkeypatch, packed, tokens, c.experts_per_token)
        tensors = [a for a in args if isinstance(a, Tensor)]
        x, codes, xs, *_ = tensors
        h, hs, parts1, parts2, arrived, _, y = tensors[9:16]
        took = sum(t.nbytes for t in (x, codes, xs, h, hs, parts1, parts2, y))
        planned = workspace(c, layout, Parallel(ranks), Limits(tokens, tokens, 4096))
        assert took <= sum(b.size for b in planned if b.phase == "experts")
        slots = tokens * c.experts_per_token
        last = 2 + slots + slots * packed.w13.shape[1] + packed.w2.shape[1] * tokens
        assert last <= arrived.numel()


def test_blocks_of_32_tokens_have_fewer_registers_where_none_is_on_the_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1,024 tokens of Flash; scales apart and on Blackwell the compiler has as many as it likes."""
    monkeypatch.setattr(moe, "INTERPRETED", False)
    pick = partial(moe._config, count=256, tiles1=32)
    for major, absorb, fixed, regs in (
        (9, True, False, 168), (9, False, False, 0), (9, True, True, 168), (10, True, False, 0),
    ):  # fmt: skip
        monkeypatch.setattr(moe, "capability", lambda major=major: (major, 0))
        packed = _of_shape(256, 4096, 2048)
        packed = moe.PackedExperts(
            *(getattr(packed, n) for n in ("w13", "s13", "b13", "w2", "s2", "b2", "hidden")), absorb
        )
        assert pick(6 * 1024, packed=packed, fixed=fixed) == dict(
            bt=32, grouped=0, split1=1, absorb=absorb, warps=4, stages=3, regs=regs
        )
        for tokens in (256, 512):
            c = pick(6 * tokens, packed=packed, fixed=fixed)
            assert (c["bt"], c["warps"], c["stages"], c["regs"]) == (16, 4, 4, 0)


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
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 33, 128, 300, 1100])
def test_many_tokens_of_few_experts(tokens: int, one_launch: int) -> None:
    """Tiles of 16 to 128 tokens, with and without scales in the table, and all tokens to the same two experts."""
    if one_launch and tokens * 6 > ONE_LAUNCH:
        pytest.skip("the same launches")
    packed, dense = make(8, 1024, 512)
    ids = torch.stack([torch.randperm(8, generator=_g(t))[:6] for t in range(tokens)])
    check(packed, dense, ids, 6e-3)
    check(packed, dense, ids, 6e-3, absorb=0)
    check(packed, dense, torch.tensor([[5, 2]] * tokens), 6e-3)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
def test_one_launch_again_and_again(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several waves of programs, replayed in a graph with other experts each time: the same bits as one by one."""
    monkeypatch.setitem(TAKEN, "slots", ONE_LAUNCH)
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
