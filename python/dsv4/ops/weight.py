"""Matrices as a checkpoint stores them. Ops take a `Weight`; the reference decodes it where it is used, a backend may
want it in another form, which `Ops.prepare` asks it for once, at load.

| value | stored | decodes to |
| --- | --- | --- |
| a tensor | float32 or bfloat16 [..., out, in] | itself |
| `Fp8Weight` | e4m3 codes, one ue8m0 scale per 128 x 128 | `dtype` |
| `Fp4Weight` | e2m1 codes, two in a byte (the low nibble first), one ue8m0 scale per 32 of a row | `dtype` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsv4.formats import fp4_decode, fp4_unpack, ue8m0_decode
from dsv4.row_sizes import FP4_BLOCK, FP8_BLOCK


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes with scales; indexing and moving act on both."""

    block: ClassVar[tuple[int, int]]
    """Rows and columns of `codes` that share a scale."""
    sharing: ClassVar[tuple[int, int]]
    """The same in numbers of the matrix."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the decoded matrix."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: int) -> Packed:
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def part(self, axis: int, first: int, end: int) -> Packed:
        """Rows (axis 0) or columns (1) first .. end - 1 of the matrix, or of every matrix of a stack. Numbers that share a
        scale stay together: the run starts with a block or lies within one."""
        size = type(self).sharing[axis]
        assert first % size == 0 or first // size == (end - 1) // size, (first, end, size)
        each = self.shape[-1] // self.codes.shape[-1] if axis else 1
        codes = self.codes.narrow(axis - 2, first // each, (end - first) // each)
        scales = self.scales.narrow(axis - 2, first // size, -(-end // size) - first // size)
        return replace(self, codes=codes.contiguous(), scales=scales.contiguous())

    def to(self, target: torch.dtype | torch.device | str) -> Packed:
        """On another device, or decoding to another dtype."""
        if isinstance(target, torch.dtype):
            return replace(self, dtype=target)
        return replace(self, codes=self.codes.to(target), scales=self.scales.to(target))

    @staticmethod
    def decoded(codes: Tensor, scales: Tensor) -> Tensor:
        """float32 of codes with float32 scales of any value."""
        raise AssertionError("a packed weight defines decoded")

    def dense(self) -> Tensor:
        """Decoded, in `dtype`."""
        return self.decoded(self.codes, ue8m0_decode(self.scales)).to(self.dtype)


class Fp8Weight(Packed):
    """codes float8_e4m3fn [..., out, in], scales uint8 [..., ceil(out / 128), ceil(in / 128)]."""

    __slots__ = ()
    block = sharing = (FP8_BLOCK, FP8_BLOCK)

    @staticmethod
    def decoded(codes: Tensor, scales: Tensor) -> Tensor:
        out, width = codes.shape[-2:]
        wide = scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
        return codes.float() * wide[..., :out, :width]


class Fp4Weight(Packed):
    """codes uint8 [..., out, in / 2], scales uint8 [..., out, in / 32]."""

    __slots__ = ()
    block, sharing = (1, FP4_BLOCK // 2), (1, FP4_BLOCK)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @staticmethod
    def decoded(codes: Tensor, scales: Tensor) -> Tensor:
        return fp4_decode(fp4_unpack(codes)) * scales.repeat_interleave(FP4_BLOCK, -1)


Weight = Tensor | Packed


class Gated(NamedTuple):
    """The three projections of an expert, or of a stack of them [E, ...]: gate and up [i, d], down [d, i]."""

    w1: Weight
    w3: Weight
    w2: Weight


def dense(weight: Weight) -> Tensor:
    """The matrix as a tensor."""
    return weight.dense() if isinstance(weight, Packed) else weight


def part(weight: Weight, axis: int, first: int, end: int) -> Weight:
    """Rows (axis 0) or columns (1) first .. end - 1 of a matrix, or of each of a stack; of a vector its elements."""
    if isinstance(weight, Packed):
        return weight.part(axis, first, end)
    return weight.narrow(max(weight.dim() - 2, 0) + axis if weight.dim() > 1 else 0, first, end - first)


def joined(weights: Sequence[Weight]) -> Weight | None:
    """Matrices of one width, the rows of each below those of the one before; None where they are not stored alike or rows that share a
    scale would be parted."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Packed):
        whole = all(w.shape[0] % type(first).sharing[0] == 0 for w in weights[:-1])
        if not whole or any(type(w) is not type(first) or w.dtype != first.dtype for w in weights):
            return None
        codes = torch.cat([w.codes.view(torch.uint8) for w in weights]).view(first.codes.dtype)
        return replace(first, codes=codes, scales=torch.cat([w.scales for w in weights]))
    if any(isinstance(w, Packed) or w.dtype != first.dtype for w in weights):
        return None
    return torch.cat(list(weights))


Op = TypeVar("Op", bound=Callable[..., Any])


def prepared_by(hook: Callable[[Any], Any]) -> Callable[[Op], Op]:
    """Says in what form an op wants its weight (a `Weight` or `Gated`): `hook` makes it, once at load."""

    def mark(op: Op) -> Op:
        op.prepare = hook  # type: ignore[attr-defined]
        return op

    return mark
