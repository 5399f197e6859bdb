"""Row formats: how a row of the cache lies in bytes, and the codec that every backend must agree with.

A *region* is the rows of one component and layer in one page or slab, uint8 [P, rows * row_bytes]. A format
with scales keeps two planes in a region: the data of all rows, then the scales of all rows (FlashMLA's page
order), so that data stays aligned to 16 bytes.

| name | rows | bytes of a row | source |
| --- | --- | --- | --- |
| `float32`, `bfloat16` | main, index | 4 or 2 per channel | |
| `fp8_ds_mla` | main | e4m3, then the rope part in bf16; 8 bytes of ue8m0 scales, one per 64 | spec 8.2 |
| `mxfp4` | index | e2m1 per channel after a Hadamard rotation, one ue8m0 scale per 32 | spec 5 |
| `fp8` | index | e4m3 per channel after a Hadamard rotation, one float32 scale | spec 8.2 |
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsv4.row_sizes import FP4_BLOCK, MLA_SCALE_BYTES, NOPE_BLOCK, planes

E4M3_MAX = 448.0
FP4_MAX = 6.0
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BELOW = 1 - 2.0**-24
_FP4_BOUNDS = (0.25, 0.75 * _BELOW, 1.25, 1.75 * _BELOW, 2.5, 3.5 * _BELOW, 5.0)
"""Largest float32 that still rounds to each value: half way where the value's code is even, just below it
where odd, so that ties go to the even code as in the hardware's conversion."""


class RowFormat(Protocol):
    """The codec of one row width."""

    name: str
    dim: int
    planes: tuple[int, ...]
    """Bytes of a row in each plane; their sum is the row's bytes."""

    def read(self, region: Tensor, page: Tensor, row: Tensor, rows: int) -> Tensor:
        """Rows `row` int64 [N] of places `page` int64 [N], decoded to float32 [N, dim]."""
        ...

    def write(self, region: Tensor, page: Tensor, row: Tensor, values: Tensor, rows: int) -> None:
        """Encodes float32 [N, dim] in place; touches those rows' bytes only."""
        ...

    def roundtrip(self, values: Tensor) -> Tensor:
        """What `read` gives after `write`, float32 [..., dim]."""
        ...

    def transform(self, query: Tensor) -> Tensor:
        """The query side of a dot product with read rows: float32 [..., dim] into the space that rows are
        stored in."""
        ...


def pow2_ceil(x: Tensor) -> Tensor:
    """Smallest power of two >= x, exactly, for positive normal float32 (ue8m0 scales are powers of two)."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def ue8m0_encode(scale: Tensor) -> Tensor:
    """Powers of two -> biased exponents, uint8."""
    return (torch.frexp(scale).exponent - 1 + 127).to(torch.uint8)


def ue8m0_decode(byte: Tensor) -> Tensor:
    """Biased exponents uint8 -> float32 powers of two."""
    return torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte.to(torch.int32) - 127)


def fp4_encode(x: Tensor) -> Tensor:
    """Scaled float32 values -> nearest e2m1 codes 0..15, uint8; ties go to the even code, excess to 6."""
    code = torch.bucketize(x.abs(), torch.tensor(_FP4_BOUNDS, device=x.device))
    return (code | ((x < 0).long() << 3)).to(torch.uint8)


def fp4_decode(code: Tensor) -> Tensor:
    """e2m1 codes -> float32."""
    table = torch.tensor([*_FP4_VALUES, *(-v for v in _FP4_VALUES)], device=code.device)
    return table[code.long()]


def fp4_pack(code: Tensor) -> Tensor:
    """Codes [..., n] -> bytes [..., n / 2], the low nibble first."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def fp4_unpack(packed: Tensor) -> Tensor:
    """Bytes [..., n / 2] -> codes [..., n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def rotate(x: Tensor) -> Tensor:
    """Hadamard rotation of the last dimension, its own inverse, as a butterfly of sums: the same bits for a row however many
    there are."""
    n = x.shape[-1]
    y, half = x.float(), 1
    while half < n:
        y = y.unflatten(-1, (-1, 2, half))
        a, b = y[..., 0, :], y[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return y * n**-0.5


class _Coded:
    """Formats whose rows are encoded to planes of bytes. Subclasses give `encode` and `decode`."""

    name: str
    dim: int
    planes: tuple[int, ...]

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """float32 [N, dim] -> one uint8 [N, bytes] per plane."""
        raise AssertionError("a format defines encode")

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        """The way back, float32 [N, dim]."""
        raise AssertionError("a format defines decode")

    def _plane(self, region: Tensor, index: int, rows: int) -> Tensor:
        """uint8 [P, rows, bytes], a view."""
        start = rows * sum(self.planes[:index])
        return region[:, start : start + rows * self.planes[index]].unflatten(1, (rows, self.planes[index]))

    def read(self, region: Tensor, page: Tensor, row: Tensor, rows: int) -> Tensor:
        planes = (self._plane(region, i, rows) for i in range(len(self.planes)))
        return self.decode(tuple(_gather(plane, page, row) for plane in planes))

    def write(self, region: Tensor, page: Tensor, row: Tensor, values: Tensor, rows: int) -> None:
        for i, data in enumerate(self.encode(values)):
            self._plane(region, i, rows)[page, row] = data

    def roundtrip(self, values: Tensor) -> Tensor:
        return self.decode(self.encode(values.flatten(0, -2))).view(values.shape)

    def transform(self, query: Tensor) -> Tensor:
        return query


def _gather(plane: Tensor, page: Tensor, row: Tensor) -> Tensor:
    """plane[page, row] of a uint8 [P, rows, n], in words as wide as alignment allows: much quicker."""
    for word in (torch.int64, torch.int32, torch.int16):
        if not any(x % word.itemsize for x in (plane.storage_offset(), plane.shape[2], *plane.stride()[:2])):
            return plane.view(word)[page, row].view(torch.uint8)
    return plane[page, row]


class Plain(_Coded):
    """float32 or bfloat16 as it is."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
        self.planes = planes(name, dim, 0)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values.to(self.dtype).contiguous().view(torch.uint8),)

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        return planes[0].contiguous().view(self.dtype).float()


class Fp8DsMla(_Coded):
    """Channels before the rope part as e4m3 with one ue8m0 scale per 64, the rope part as bf16."""

    name = "fp8_ds_mla"

    def __init__(self, dim: int, rope_dim: int) -> None:
        self.dim, self.rope_dim, self.nope = dim, rope_dim, dim - rope_dim
        self.blocks = -(-self.nope // NOPE_BLOCK)
        self.planes = planes(self.name, dim, rope_dim)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        padding = (0, self.blocks * NOPE_BLOCK - self.nope)
        nope = torch.nn.functional.pad(values[:, : self.nope].float(), padding)
        blocks = nope.unflatten(1, (self.blocks, NOPE_BLOCK))
        scale = pow2_ceil(blocks.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX)
        codes = (blocks / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        codes = codes.flatten(1)[:, : self.nope].contiguous().view(torch.uint8)
        rope = values[:, self.nope :].to(torch.bfloat16).contiguous().view(torch.uint8)
        scales = torch.nn.functional.pad(ue8m0_encode(scale), (0, MLA_SCALE_BYTES - self.blocks))
        return torch.cat((codes, rope), dim=1), scales

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        data, scales = planes
        nope = data[:, : self.nope].contiguous().view(torch.float8_e4m3fn).float()
        scale = ue8m0_decode(scales[:, : self.blocks]).repeat_interleave(NOPE_BLOCK, dim=1)[:, : self.nope]
        rope = data[:, self.nope :].contiguous().view(torch.bfloat16).float()
        return torch.cat((nope * scale, rope), dim=1)


class Mxfp4(_Coded):
    """Hadamard, then e2m1 with one ue8m0 scale per 32: as the indexer was trained. Rows stay rotated."""

    name = "mxfp4"

    def __init__(self, dim: int) -> None:
        self.dim, self.blocks = dim, dim // FP4_BLOCK
        self.planes = planes(self.name, dim, 0)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        codes, scale = self._quantise(rotate(values))
        return fp4_pack(codes.flatten(1)), ue8m0_encode(scale)

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        codes = fp4_decode(fp4_unpack(planes[0])).unflatten(1, (self.blocks, FP4_BLOCK))
        return (codes * ue8m0_decode(planes[1])[..., None]).flatten(1)

    def transform(self, query: Tensor) -> Tensor:
        codes, scale = self._quantise(rotate(query).flatten(0, -2))
        return (fp4_decode(codes) * scale[..., None]).view(query.shape)

    def _quantise(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        blocks = rotated.unflatten(1, (self.blocks, FP4_BLOCK))
        scale = pow2_ceil((blocks.abs().amax(-1) / FP4_MAX).clamp(min=2.0**-126))
        return fp4_encode(blocks / scale[..., None]), scale


class Fp8Index(_Coded):
    """Hadamard, then e4m3 with one float32 scale per row. Rows stay rotated."""

    name = "fp8"

    def __init__(self, dim: int) -> None:
        self.dim, self.planes = dim, planes(self.name, dim, 0)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        codes, scale = self._quantise(rotate(values))
        return codes.view(torch.uint8), scale.contiguous().view(torch.uint8)

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        codes, scale = (p.contiguous() for p in planes)
        return codes.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)

    def transform(self, query: Tensor) -> Tensor:
        codes, scale = self._quantise(rotate(query).flatten(0, -2))
        return (codes.float() * scale).view(query.shape)

    def _quantise(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        scale = pow2_ceil(rotated.abs().amax(-1, keepdim=True).clamp(min=1e-4) / E4M3_MAX)
        return (rotated / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


_MAKERS = {
    "float32": lambda dim, rope_dim: Plain("float32", dim),
    "bfloat16": lambda dim, rope_dim: Plain("bfloat16", dim),
    "fp8_ds_mla": Fp8DsMla,
    "mxfp4": lambda dim, rope_dim: Mxfp4(dim),
    "fp8": lambda dim, rope_dim: Fp8Index(dim),
}


def row_format(name: str, dim: int, rope_dim: int) -> RowFormat:
    """The codec `name` for rows of `dim` channels, the last `rope_dim` of them rotary. Raises ConfigError."""
    planes(name, dim, rope_dim)  # refuses unknown names and impossible dims
    return _MAKERS[name](dim, rope_dim)
