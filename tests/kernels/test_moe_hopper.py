"""FP4 experts in Gluon: the order of codes and the copies anywhere, the products on a Hopper GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels import gluon_threads as threads
from tests.kernels.device import DEVICE, close, on_hopper
from tests.kernels.quantised import codes_of, fp4, roundtrip
from tests.kernels.test_moe import LIMIT, check, make

pytest.importorskip("triton")

from dsv4.kernels.gluon import fits, moe
from dsv4.kernels.gluon.forms import MANY
from dsv4.kernels.triton import moe as portable
from dsv4.kernels.triton import moe_pack
from dsv4.kernels.triton.fits import narrow_scales
from dsv4.kernels.triton.moe_plan import plan_many
from dsv4.ops.quantised import stored

ORDER = [half * 32 + 16 * unit + at for unit in range(2) for half in range(2) for at in range(16)]
"""Channels of 64 in the order of expanded weights."""


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_packed_words_hold_low_and_high_channels() -> None:
    codes, scales, values = fp4((128, 128), _g(), low=120, high=121)
    words = moe_pack.pack_rows(codes[None], scales[None])[0][0].view(torch.int32)[0]  # [2, 128, 8]
    shift = torch.arange(4, dtype=torch.int32)
    low = (words[..., None] >> 4 * shift) & 7, (words[..., None] >> 8 * shift + 7) & 1
    high = (words[..., None] >> 4 * shift + 16) & 7, (words[..., None] >> 8 * shift + 3) & 1
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 2.0 ** (120 - 127)
    looked = torch.cat([(table[m] * (1 - 2 * s)).flatten(-2) for m, s in (low, high)], -1)  # [2, 128, 64]
    assert torch.equal(looked, values.view(128, 2, 64).transpose(0, 1))


@pytest.mark.parametrize("given", [lambda x: x, codes_of], ids=["values", "codes"])
def test_codes_are_spread_to_the_places_of_their_slots(given: Any) -> None:
    tokens, k, dim, count = 9, 2, 256, 3
    x = torch.randn((tokens, dim), generator=_g()).to(DEVICE)
    experts = torch.tensor([[2, 0], [1, 2], [-1, 2], [0, 3]] * 3)[:tokens].to(DEVICE)
    slots, steps = tokens * k, 2
    weights = torch.rand((tokens, k), generator=_g()).to(DEVICE)
    codes = torch.zeros((slots, dim), dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.zeros((2, (slots + 4) * 4), dtype=torch.uint8, device=DEVICE)
    gates = torch.zeros(slots, device=DEVICE)
    _, places, _ = plan_many(experts, count, 4, 2)
    source, xs = stored(given(x))
    moe.spread_kernel[(2 * steps,)](
        source, experts, weights, places, codes, scales, gates, slots + 4, count, dim, steps, dim, tokens, TOPK=k,
        PDL=False, xs=xs, xs_stride=tokens + -tokens % 4,
    )  # fmt: skip
    flat = experts.flatten().tolist()
    order = [s for e in range(count) for s in range(slots) if flat[s] == e]
    assert torch.equal(gates[: len(order)], weights.flatten()[order])
    bits = scales.view(2, slots + 4, 4)[0, : len(order), :steps].to(torch.int32) << 23
    wide = bits.contiguous().view(torch.float32).repeat_interleave(128, 1)
    back = torch.empty((len(order), dim // 64, 64))
    back[..., ORDER] = (codes[: len(order)].float() * wide).cpu().view(-1, dim // 64, 64)
    assert torch.equal(back.flatten(1), roundtrip(x.cpu())[[s // k for s in order]])


@pytest.mark.parametrize("step", [2, 8])
def test_slots_by_expert_and_their_blocks(step: int) -> None:
    """Several chunks; experts without slots, with one block, with several; ids that are no expert."""
    count, most = 5, 8
    ids = torch.randint(-1, count + 1, (40, 3), generator=_g())
    ids[ids == 3] = 0
    ids[5, 1] = 3
    rows, places, plan = (t.tolist() for t in plan_many(ids.to(DEVICE), count, most, step))
    flat = ids.flatten().tolist()
    order = [s for e in range(count) for s in range(len(flat)) if flat[s] == e]
    assert rows[: len(order)] == order
    assert [places[s] for s in order] == list(range(len(order)))
    blocks, start = [], 0
    for e in range(count):
        n = flat.count(e)
        size = -(-n // max(1, -(-n // most)))
        size += -size % step
        blocks += [(-size, e, start + j, min(size, n - j)) for j in range(0, n, max(size, 1))]
        start += n
    expected = [v for _, *block in sorted(blocks) for v in block]
    assert plan[0] == len(blocks) and plan[3 : 3 + len(expected)] == expected


def test_sum_leaves_out_slots_without_an_expert() -> None:
    out = torch.full((4, 8), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    out[[0, 3]] = 1.5
    experts = torch.tensor([[1, -1], [7, 0]], device=DEVICE)
    y = portable.combine(
        out, experts, 3, torch.ones((2, 8), device=DEVICE), torch.empty((2, 8), device=DEVICE)
    )
    assert torch.equal(y.cpu(), torch.full((2, 8), 2.5))


def test_few_tokens_wide_scales_and_odd_widths_go_to_triton() -> None:
    packed, _ = make(4, 128, 64)
    least, ids = MANY * 4 // 2, lambda tokens: torch.zeros((tokens, 2), dtype=torch.int64)
    x = torch.empty(least, 128)
    assert narrow_scales(packed) and fits.many_slots(x, ids(least), None, packed)
    assert not fits.many_slots(x, ids(least - 1), None, packed)
    assert not fits.many_slots(torch.empty(least, 160), ids(least), None, packed)
    names = portable.PackedExperts.__dataclass_fields__
    wide = portable.PackedExperts(**{n: getattr(packed, n) for n in names} | {"absorb": False})
    assert not narrow_scales(wide)


def _look_up(
    text: str, registers: str, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> tuple[Any, Any]:
    """The assembly: magnitudes of low and high looked up in their 8 bytes, and the signs."""
    x, *tables = (np.asarray(v).astype(np.int64) & 0xFFFFFFFF for v in args)
    both = []
    for word, signs, a, b in ((x, x, *tables[:2]), (x >> 16, x << 4, *tables[2:])):
        byte = np.stack([t >> 8 * i & 255 for t in (a, b) for i in range(4)], -1)
        picks = [
            np.take_along_axis(byte, (word >> 4 * i & 7)[..., None], -1)[..., 0] << 8 * i for i in range(4)
        ]
        both.append(threads.array((sum(picks) | signs & 0x80808080).astype(np.uint32).view(np.int32)))
    return both[0], both[1]


def _pow2_scale(most: Any) -> tuple[Any, Any]:
    scale = np.exp2(np.ceil(np.log2(np.maximum(np.asarray(most, dtype=np.float64), 1e-4) / 448)))
    return threads.array(scale.astype(np.float32)), threads.array((1 / scale).astype(np.float32))


STANDINS = {
    "mark": lambda *at: None,
    "moe_pack": SimpleNamespace(_table=moe_pack._table.fn),
    "pow2_scale": _pow2_scale,
    "to_e4m3": lambda v: threads.array(torch.from_numpy(np.array(v, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8)),
    "silu_gate": lambda a, b, limit: np.minimum(a, limit) / (1 + np.exp(-np.minimum(a, limit))) * np.clip(b, -limit, limit),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "dim", "inner", "programs"),
    [
        ([[2, 0], [1, -1], [3, 4], [0, 2]] * 15, 256, 128, 11),
        ([[1, 2]] * 290, 128, 128, 2),
        ([[1, 2, 3]] * 20 + [[3, 3, 0]] * 60 + [[0, 0, 0]] * 30, 256, 256, 1),
    ],
    ids=["one piece, unknown experts", "two blocks of an expert", "one to four pieces"],
)
def test_roles_as_threads(ids: list[list[int]], dim: int, inner: int, programs: int) -> None:
    """Both products by the kernel's source, slot by slot. Codes that nobody has are NaN, scales infinite."""
    packed, (w1, w3, w2) = make(4, dim, inner)
    experts, tokens, k = torch.tensor(ids).flatten().tolist(), len(ids), len(ids[0])
    g, slots = _g(tokens), tokens * k
    x, gate = torch.randn((tokens, dim), generator=g), torch.rand(slots, generator=g)
    order = [s for e in range(4) for s in range(slots) if experts[s] == e]
    plan, start = [], 0
    for e in range(4):
        count = experts.count(e)
        plan += [(e, start + j, min(256, count - j)) for j in range(0, count, 256)]
        start += count
    entries = np.full(
        3 + 3 * (len(plan) + programs), 1 << 20, np.int32
    )  # a plan has room for more blocks than there are
    entries[0] = len(plan)
    entries[3 : 3 + 3 * len(plan)] = np.array(plan).flatten()
    rows = np.array(order + [0] * (slots - len(order)), np.int32)
    v = x[[s // k for s in order]].view(len(order), -1, 128)
    scale = torch.from_numpy(np.asarray(_pow2_scale(v.abs().amax(-1))[0]))
    codes = np.full((slots, dim), 127, np.uint8)
    codes[: len(order)] = (
        (v / scale[..., None])
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
        .view(-1, dim // 64, 64)[..., ORDER]
        .flatten(1)
    )
    tiles1, tiles2 = packed.w13.shape[1], packed.w2.shape[1]
    scales, hs = (np.full((-(-n // 4) + 1, slots + 256, 4), 255, np.uint8) for n in (dim // 128, tiles1))
    bits = scale.numpy().view(np.int32) >> 23
    for n in range(dim // 128):
        scales[n // 4, : len(order), n % 4] = bits[:, n]
    gates = np.full(slots, np.nan, np.float32)
    gates[: len(order)] = gate[order]
    h, out = np.full((slots, tiles1 * 64), 127, np.uint8), np.full((slots, dim), np.nan, np.float32)
    for first, rows_of, xs, w, ws, base, to, tiles in (
        (True, codes, scales, packed.w13, packed.s13, packed.b13, h, tiles1),
        (False, h, hs, packed.w2, packed.s2, packed.b2, out, tiles2),
    ):
        words = w.cpu().view(-1, 128).view(torch.int32).numpy()
        flat = [
            threads.Pointer(np.asarray(t).reshape(-1))
            for t in (
                xs.view(np.int32),
                base.cpu(),
                entries,
                rows,
                gates,
                to,
                hs,
            )
        ]
        xd, wd = threads.Descriptor(rows_of, (64, 64)), threads.Descriptor(words, (64, 32))
        sd = threads.Descriptor(ws.cpu().numpy().reshape(-1, 32), (8, 32))
        args = (
            xd,
            wd,
            sd,
            *flat,
            LIMIT,
            slots + 256,
            rows_of.shape[1] // 128,
            None,
            0,
            tiles,
            first,
        )
        threads.run(moe, "product_kernel", args, programs, _look_up, STANDINS, seed=tokens)
    xq = roundtrip(x)
    expected = torch.full((slots, dim), torch.nan)
    for s in order:
        e, t = experts[s], s // k
        a, b = (w1[e] @ xq[t]).clamp(max=LIMIT), (w3[e] @ xq[t]).clamp(-LIMIT, LIMIT)
        expected[s] = w2[e] @ roundtrip(torch.nn.functional.silu(a) * b * gate[s], 64)
    assert close(torch.from_numpy(out[order]), expected[order]) < 1e-5
    assert np.isnan(out[[s for s in range(slots) if s not in order]]).all()


@on_hopper
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 129, 300, 1100])
def test_equals_the_loop(tokens: int) -> None:
    """One to four pieces of 64 slots, several blocks of an expert, experts without tokens."""
    packed, dense = make(8, 1024, 512)
    ids = torch.stack([torch.randperm(8, generator=_g(t))[:3] for t in range(tokens)])
    check(packed, dense, ids, 6e-3, moe.run)
    check(packed, dense, torch.tensor([[5, 2]] * tokens), 6e-3, moe.run)


@on_hopper
def test_unknown_experts_count_nothing() -> None:
    packed, dense = make(8, 1024, 512)
    check(packed, dense, torch.tensor([[3, -1], [8, 0], [-1, 99]] * 50), 6e-3, moe.run)
    y = moe.run(
        torch.ones((5, 1024), device=DEVICE), torch.full((5, 2), -1, device=DEVICE), torch.ones((5, 2), device=DEVICE),
        packed, LIMIT, None,
    )  # fmt: skip
    assert not y.any()


@on_hopper
def test_experts_without_tokens_are_not_read() -> None:
    packed, dense = make(8, 1024, 512)
    scales = packed.s13.clone()
    scales[[1, 2]] = -1
    names = portable.PackedExperts.__dataclass_fields__
    poisoned = portable.PackedExperts(**{n: getattr(packed, n) for n in names} | {"s13": scales})
    check(poisoned, dense, torch.tensor([[0, 3], [3, 7]] * 40), 6e-3, moe.run)


@on_hopper
@pytest.mark.parametrize(("count", "dim", "inner"), [(8, 4096, 2048), (6, 7168, 3072)], ids=["flash", "pro"])
def test_model_shapes_beside_triton(count: int, dim: int, inner: int) -> None:
    packed, dense = make(count, dim, inner)
    check(packed, dense, torch.tensor([[0, 5], [5, 2], [4, 0]] * 8), 6e-3, moe.run)
    for tokens in (333, 2048):
        x = torch.randn((tokens, dim), generator=_g(1)).to(DEVICE, torch.bfloat16)
        ids = torch.rand((tokens, count), generator=_g(2)).topk(6).indices.to(DEVICE)
        args = (x, ids, torch.rand((tokens, 6), generator=_g(3)).to(DEVICE), packed, LIMIT, x)
        ours = moe.run(*args)
        assert close(ours, portable.run(*args)) < 6e-3
        assert all(torch.equal(ours, moe.run(*args)) for _ in range(3))
        assert torch.equal(ours, moe.run(codes_of(x), *args[1:]))
