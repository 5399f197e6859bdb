"""What crosses between ranks before the experts, and that tokens which are cut have the bits of tokens which every rank has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dsv4.backends import choose
from dsv4.model.cut import Places
from dsv4.model.ranked import RankedMoE
from dsv4.model.scope import Scope
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Fp4Weight, Fp8Weight
from torch import Tensor

from tests.kernels.device import DEVICE
from tests.kernels.quantised import fp4, fp8
from tests.support.ranks import Deaf

pytest.importorskip("triton")

from dsv4.kernels.triton.quantise import quantise

OWNED, SHARED, EXPERTS, K, DIM, INNER = 3, 1, 4, 2, 256, 128


class Recording(Deaf):
    """Keeps what it said: dtype and shape."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.messages: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        self.messages.append((x.dtype, tuple(x.shape)))
        return super().gather(x, out)


def _weights(g: torch.Generator, packed: tuple[str, ...]) -> dict[str, Any]:
    """Those of a mixture in float32, or of the named ones as the release stores them."""
    found: dict[str, Any] = {
        "gate.weight": torch.randn((EXPERTS, DIM), generator=g) / 16,
        "gate.bias": torch.randn(EXPERTS, generator=g),
        "gate.tid2eid": torch.tensor([[1, 0], [2, 3], [0, 3], [3, 1]]),
    }
    for name, shape in {"w1": (INNER, DIM), "w3": (INNER, DIM), "w2": (DIM, INNER)}.items():
        codes, scales, _ = fp4((EXPERTS, *shape), g)
        found[f"experts.{name}"] = Fp4Weight(codes, scales, torch.float32)
        codes, scales, _ = fp8(*shape, g)
        found[f"shared_experts.{name}.weight"] = Fp8Weight(codes, scales, torch.float32)
    kept = {n: w if n.startswith(packed) or isinstance(w, Tensor) else w.dense() for n, w in found.items()}
    return {n: w.to(DEVICE) for n, w in kept.items()}


def _mixed(ops: Ops, packed: tuple[str, ...], layer: int) -> tuple[Tensor, Tensor, list[Any]]:
    """Of OWNED tokens of a rank and SHARED ones: as they are dealt out, as all are on every rank, and what was said of the former. The other
    rank has the same tokens."""
    g, rank = torch.Generator().manual_seed(layer), Recording()
    config: Any = SimpleNamespace(
        swiglu_limit=7.0, experts_per_token=K, routed_scaling_factor=1.5, num_hash_layers=1
    )
    mixture = RankedMoE(Scope(_weights(g, packed), ops), config, layer, ops)
    x = torch.randn((OWNED + SHARED, DIM), generator=g).to(DEVICE)
    ids = torch.tensor([0, 1, 3, 2], device=DEVICE)
    fp8_shared = ops.quantises("swiglu", mixture.shared)
    shared = Quantised.of(x, *quantise(x, pad=4)) if fp8_shared else x
    every = torch.cat((ids[:OWNED], ids))
    cut: Any = SimpleNamespace(places=Places(rank, OWNED, SHARED), token_ids=every)
    whole: Any = SimpleNamespace(places=Places(rank, 0, len(x)), token_ids=ids)
    dealt, said = mixture(x, shared, cut), list(rank.messages)
    return dealt, mixture(x, shared, whole), said


@pytest.mark.parametrize("layer", [0, 1], ids=["hashed", "scored"])
def test_codes_cross_where_all_readers_take_them(layer: int) -> None:
    ops = choose("triton", "cuda", deterministic=True, major=8)
    dealt, whole, said = _mixed(ops, ("shared_experts", "experts"), layer)
    assert torch.equal(dealt, whole)
    scales, choice = DIM // 128, 2 * K + K
    assert said[:2] == [(torch.int32, (OWNED, choice + scales)), (torch.float8_e4m3fn, (OWNED, DIM))]


@pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU multiplies by cuBLAS here, whose bits may depend on the number of tokens"
)
@pytest.mark.parametrize("packed", [(), ("shared_experts",)], ids=["plain", "shared in FP8"])
def test_values_cross_where_one_reader_takes_them(packed: tuple[str, ...]) -> None:
    names = choose("reference", "cpu").chains
    if packed:
        by_triton = choose("triton", "cuda", deterministic=True, major=8)
        names = names | {"swiglu": by_triton.chains["swiglu"]}
    ops = Ops(names, choose("reference", "cpu").machine)
    dealt, whole, said = _mixed(ops, packed, 1)
    assert torch.equal(dealt, whole)
    assert said[:2] == [(torch.int32, (OWNED, 3 * K)), (torch.float32, (OWNED, DIM))]
