"""Routed FP4 experts as the kernels read them (e2m1, one ue8m0 scale per 32 channels). They are repacked once at load,
without changing their size, so that a program streams contiguous memory:

- a tile is 128 rows x 64 channels, 32 bytes a row; w1 and w3 alternate in runs of 8 rows, so that a thread of the
  matrix unit holds both and SwiGLU costs no exchange;
- 4 bytes of a row hold 4 weights of its first 32 channels ("low") and 4 of its second ("high"): magnitudes of low in
  bits 4j to 4j + 2, of high in 16 + 4j to 18 + 4j, signs in bits 8j + 7 and 8j + 3. A byte permute then looks 4
  magnitudes up in a table of 8 e4m3 bytes: 7 integer operations for 8 weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.quantise import EMULATE
from dsv4.ops.weight import Fp4Weight, Gated

log = logging.getLogger("dsv4.kernels")

SPAN = 11
"""Binary orders of magnitude that a row's scales may span to be taken into the lookup table."""

_AT_ONCE = 1 << 25
"""Bytes of codes that are repacked at a time: what is taken meanwhile is some 30 times that, and a launch for each expert alone takes the host
longer than the GPU."""


@triton.jit
def _expand(wp, a0, b0, a1, b1):
    """Packed [N, 32] at wp -> (low, high) as e4m3, looked up in (a0, b0) and (a1, b1), int32 tables [N, 1] of the bytes for
    magnitudes 0, .5, 1, 1.5 (a) and 2, 3, 4, 6 (b)."""
    x = tl.load(wp)
    if EMULATE:
        c = tl.arange(0, 32)[None, :]
        unit = wp - c % 4 + (c % 4) // 2
        low = (tl.load(unit).to(tl.int32) >> (c % 2 * 4)) & 7
        high = (tl.load(unit + 2).to(tl.int32) >> (c % 2 * 4)) & 7
        sign = x.to(tl.int32)
        low = (tl.where(low < 4, a0 >> (low * 8), b0 >> (low * 8 - 32)) & 255) | (sign & 128)
        high = (tl.where(high < 4, a1 >> (high * 8), b1 >> (high * 8 - 32)) & 255) | ((sign << 4) & 128)
        low, high = low.to(tl.uint8), high.to(tl.uint8)
    else:
        a0, b0 = tl.broadcast_to(a0, x.shape), tl.broadcast_to(b0, x.shape)
        a1, b1 = tl.broadcast_to(a1, x.shape), tl.broadcast_to(b1, x.shape)
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, p, q;
            and.b32 t, $2, 0x77777777;
            shr.u32 u, t, 16;
            prmt.b32 p, $3, $7, t;
            lop3.b32 $0, $2, 0x80808080, p, 0xEA;
            prmt.b32 q, $11, $15, u;
            shl.b32 t, $2, 4;
            lop3.b32 $1, t, 0x80808080, q, 0xEA;
            }""",
            "=&r,=&r,r" + ",r" * 16,
            [x, a0, b0, a1, b1],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def channel_at(place):
    """The channel whose weight lies at `place` of an expanded row, and the other way round: of each 64 the second and third 16 change places. So a matrix
    instruction's 32 channels are 16 low and 16 high ones, whose words a thread finds where it looks them up."""
    return place // 64 * 64 + place // 16 % 2 * 32 + place // 32 % 2 * 16 + place % 16


@triton.jit
def _paired(low, high):
    """(low, high) [N, 32] each as [N, 64] in the order of `channel_at`."""
    n: tl.constexpr = low.shape[0]
    both = tl.join(tl.reshape(low, (n, 2, 16)), tl.reshape(high, (n, 2, 16)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (n, 64))


@triton.jit
def _side_by_side(w0, w1):
    """[N, 64] of two [N, 32], one behind the other: a matrix of 64 channels whose values stay in the registers they are in."""
    n: tl.constexpr = w0.shape[0]
    return tl.reshape(tl.permute(tl.join(w0, w1), (0, 2, 1)), (n, 64))


@triton.jit
def _four(w0, w1, w2, w3):
    """[N, 128] of four [N, 32], likewise."""
    n: tl.constexpr = w0.shape[0]
    both = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.permute(both, (0, 2, 3, 1)), (n, 128))


@triton.jit
def _table(byte, g: tl.constexpr):
    """Lookup tables of group g, whose byte holds 8 x the exponent above the row's base: e4m3 bytes of value x 2^(t - 5). 0 stays 0."""
    t = (byte >> (8 * g)) & 255
    return t * 0x01010100 + 0x14100800, t * 0x01010101 + 0x24201C18


@triton.jit
def _group_scale(s, g: tl.constexpr):
    return (((s >> (8 * g)) & 255) << 23).to(tl.float32, bitcast=True)


def pack_rows(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checkpoint rows of experts, codes uint8 [E, N, K / 2] (low nibble first) and ue8m0 scales [E, N, K / 32], as tiles uint8
    [E, N / 128, K / 64, 128, 32], scales int32 [E, N / 128, K / 128, 128], the rows' lowest scales uint8 [E, N / 128, 128], and bool []:
    whether every row spans at most SPAN. N and K are rounded up to 128; the padding is zero.
    """
    experts, pad_n, pad_k = len(codes), -codes.shape[1] % 128, -(2 * codes.shape[2]) % 128
    codes = torch.nn.functional.pad(codes, (0, pad_k // 2, 0, pad_n)).flatten(0, 1)
    scales = torch.nn.functional.pad(scales, (0, pad_k // 32, 0, pad_n)).flatten(0, 1)
    n, k = codes.shape[0], 2 * codes.shape[1]
    v = torch.stack((codes & 15, codes >> 4), -1).view(n // 128, 128, k // 64, 2, 8, 4).int()
    shift = torch.arange(4, dtype=torch.int32, device=codes.device)
    low, high = v[..., 0, :, :], v[..., 1, :, :]
    unit = ((low & 7) << (4 * shift)) | ((high & 7) << (16 + 4 * shift))
    unit |= ((low & 8) << (8 * shift + 4)) | ((high & 8) << (8 * shift))
    unit = unit.sum(-1, dtype=torch.int64)  # disjoint bits; int32 would overflow into its sign the same way
    unit = torch.where(unit >= 1 << 31, unit - (1 << 32), unit).int()
    tiles = unit.permute(0, 2, 1, 3).contiguous().view(torch.uint8)
    empty = (codes.view(n, k // 32, 16) & 0x77).amax(-1) == 0
    used = scales.int()
    lowest = torch.where(empty, 255, used).amin(-1)
    highest = torch.where(empty, 0, used).amax(-1)
    lowest = torch.where(lowest == 255, 127, lowest)
    narrow = ((highest - lowest) <= SPAN).all()
    used = torch.where(empty, lowest[:, None], used).to(torch.uint8)
    packed = used.view(n // 128, 128, k // 128, 4).permute(0, 2, 1, 3).contiguous().view(torch.int32)[..., 0]
    lowest = lowest.to(torch.uint8).view(n // 128, 128)
    tiles, packed, lowest = (x.unflatten(0, (experts, -1)) for x in (tiles, packed, lowest))
    return tiles, packed, lowest, narrow


def alternate(w1: Tensor, w3: Tensor) -> Tensor:
    """[E, N, ...] twice -> [E, 2 N, ...] in runs of 8 rows; N is padded to a multiple of 128."""
    pad = (0, 0) * (w1.dim() - 2) + (0, -w1.shape[1] % 128)
    w1, w3 = torch.nn.functional.pad(w1, pad), torch.nn.functional.pad(w3, pad)
    return torch.stack((w1.unflatten(1, (-1, 8)), w3.unflatten(1, (-1, 8))), 2).flatten(1, 3)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Repacked FP4 experts of a layer: tiles, scales and lowest scales of w1|w3 and of w2 (see the module), the real
    hidden size, and whether scales go into the lookup table where there are many tokens."""

    w13: Tensor
    s13: Tensor
    b13: Tensor
    w2: Tensor
    s2: Tensor
    b2: Tensor
    hidden: int
    absorb: bool

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.w13, self.s13, self.b13, self.w2, self.s2, self.b2))


def prepare(w: Gated) -> PackedExperts | Gated:
    """FP4 experts repacked; others as they are, for the reference, and a line in the log says so."""
    if all(isinstance(m, Fp4Weight) for m in w):
        return pack(*(t for m in w for t in (m.codes, m.scales)))
    log.warning("experts are not FP4: the reference multiplies them, expert by expert")
    return w


def pack(w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor, w2: Tensor, s2: Tensor) -> PackedExperts:
    """Codes uint8 [E, out, in / 2] and scales uint8 [E, out, in / 32] of a layer's experts, repacked a few at a time."""
    stacks: list[Tensor] = []
    spans: list[Tensor] = []
    each = max(1, _AT_ONCE // (2 * w1[0].nbytes))
    for at in range(0, len(w1), each):
        some = slice(at, at + each)
        first = pack_rows(alternate(w1[some], w3[some]), alternate(s1[some], s3[some]))
        second = pack_rows(w2[some], s2[some])
        parts = (*first[:3], *second[:3])
        stacks = stacks or [p.new_empty((len(w1), *p.shape[1:])) for p in parts]
        for stack, part in zip(stacks, parts, strict=True):
            stack[some] = part
        spans += [first[3], second[3]]
    return PackedExperts(*stacks, w2.shape[1], bool(torch.stack(spans).all()))
