"""FP4 experts in Gluon: the order of codes and the copies anywhere, the products on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, close, on_hopper
from tests.kernels.quantised import fp4, roundtrip
from tests.kernels.test_moe import LIMIT, check, make

pytest.importorskip("triton")

from dsv4.kernels.gluon import moe
from dsv4.kernels.triton import moe as portable

ORDER = [half * 32 + 4 * unit + byte for unit in range(8) for half in range(2) for byte in range(4)]
"""Channels of 64 in the order in which looking up packed weights yields them."""


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_packed_words_hold_channels_in_the_order_of_the_codes() -> None:
    codes, scales, values = fp4((128, 128), _g(), low=120, high=121)
    words = portable.pack_rows(codes, scales)[0].view(torch.int32)[0]  # [2, 128, 8]
    shift = torch.arange(4, dtype=torch.int32)
    low = (words[..., None] >> 4 * shift) & 7, (words[..., None] >> 8 * shift + 7) & 1
    high = (words[..., None] >> 4 * shift + 16) & 7, (words[..., None] >> 8 * shift + 3) & 1
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 2.0 ** (120 - 127)
    looked = torch.stack([table[m] * (1 - 2 * s) for m, s in (low, high)], -2).flatten(-3)  # [2, 128, 64]
    expected = values.view(128, 2, 64)[..., ORDER].transpose(0, 1)
    assert torch.equal(looked, expected)


def test_codes_are_spread_to_the_places_of_their_slots() -> None:
    tokens, k, dim, count = 9, 2, 256, 3
    x = torch.randn((tokens, dim), generator=_g()).to(DEVICE)
    experts = torch.tensor([[2, 0], [1, 2], [-1, 2], [0, 3]] * 3)[:tokens].to(DEVICE)
    slots, steps = tokens * k, 2
    rows, places = (torch.full((slots,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    plan = torch.zeros(3 + 3 * slots, dtype=torch.int32, device=DEVICE)
    codes = torch.zeros((slots, dim), dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.zeros((steps + 1, slots + 4), device=DEVICE)
    portable.plan_kernel[(count,)](
        experts, rows, plan, x, codes, scales, slots, count, dim, steps, dim, tokens, places,
        BINS=4, CHUNK=32, BT=4, BLOCK=128, PDL=False,
    )  # fmt: skip
    moe.spread_kernel[(2 * steps,)](
        x, experts, places, codes, scales, slots + 4, count, dim, steps, dim, tokens, TOPK=k, PDL=False
    )
    flat = experts.flatten().tolist()
    order = [s for e in range(count) for s in range(slots) if flat[s] == e]
    assert rows[: len(order)].tolist() == order
    assert [places[s].item() for s in order] == list(range(len(order)))
    wide = scales[:steps, : len(order)].t().repeat_interleave(128, 1)
    back = torch.empty((len(order), dim // 64, 64))
    back[..., ORDER] = (codes[: len(order)].float() * wide).cpu().view(-1, dim // 64, 64)
    assert torch.equal(back.flatten(1), roundtrip(x.cpu())[[s // k for s in order]])


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
    least = moe.MANY * 4 // 2
    assert moe.suits(least, 2, 128, packed) and not moe.suits(least - 1, 2, 128, packed)
    assert not moe.suits(least, 2, 160, packed)
    names = portable.PackedExperts.__dataclass_fields__
    wide = portable.PackedExperts(**{n: getattr(packed, n) for n in names} | {"absorb": False})
    assert not moe.suits(least, 2, 128, wide)


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
@pytest.mark.parametrize(("count", "dim", "inner"), [(12, 4096, 2048), (8, 7168, 3072)], ids=["flash", "pro"])
def test_model_shapes_beside_triton(count: int, dim: int, inner: int) -> None:
    packed, dense = make(count, dim, inner)
    check(packed, dense, torch.tensor([[0, 5], [5, 2], [7, 0]] * 8), 6e-3, moe.run)
    for tokens in (333, 2048):
        x = torch.randn((tokens, dim), generator=_g(1)).to(DEVICE, torch.bfloat16)
        ids = torch.rand((tokens, count), generator=_g(2)).topk(6).indices.to(DEVICE)
        args = (x, ids, torch.rand((tokens, 6), generator=_g(3)).to(DEVICE), packed, LIMIT, x)
        ours = moe.run(*args)
        assert close(ours, portable.run(*args)) < 6e-3
        assert all(torch.equal(ours, moe.run(*args)) for _ in range(3))
