"""Weights made from a seed in place of a checkpoint's files (`--load-format dummy`): every tensor in the shape and format of the
release, to measure a model that is not there.

Each 8 bytes are a hash of seed, tensor, row and column, so a rank makes the part that it keeps and no more, on its device, and
that is the cut of the whole to the bit. Values are spread so that activations stay near 1:

| what | values |
| --- | --- |
| FP4 experts | all 16 codes alike, which is about what a normal spread of 3 is rounded to |
| FP8 matrices | codes of a normal spread of 64 |
| scales | the two powers of two around the gain over the root of the width, drawn for each block |
| other matrices | normal, of spread 1 / root of the width |
| norms; scales of hyper-connections | 1 +- 0.1; 0.5 +- 0.1 |
| sinks, positions of compressors, bases | normal, of spread 0.5 |
| embedding | normal, of spread 1: tokens stay unlike, or all would go to the same experts |
| router | logits of spread 1 and a bias of spread 0.02; layers routed by id: experts drawn for each |

**Routing.** A trained router is balanced but for what a text prefers. Of 256 experts and 1,500 random tokens the busiest takes three to five
times the mean here, of 32 up to two and a half times, and hardly any is idle. What spread it is a test states in two numbers
(tests/model/test_dummy.py): the busiest load over the mean, and the effective number of experts, exp of the entropy of the loads: 84% to 89%
of 256, 92% to 96% of 32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from dsv4.model.names import TensorSpec
from dsv4.model.parallel import BLOCKS, Cut
from dsv4.model.survey import Survey
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Weight

ROUTER_BIAS = 0.02
"""Spread of the router's bias."""
_CODES = {"fp4": 2.93, "fp8": 64.0}
"""Spread of the codes of a storage."""
_PIECE = 1 << 26
"""Bytes that are made at a time: what is taken beside a tensor is a few times that."""


class Dummy:
    """The tensors of a survey `without_files`, made on `device`."""

    threads = 1

    def __init__(self, found: Survey, device: torch.device) -> None:
        self.found, self.device = found, device

    def __enter__(self) -> Dummy:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def order(self, names: list[str]) -> list[str]:
        """As they come."""
        return names

    def spec(self, name: str) -> TensorSpec:
        """Shape and storage."""
        return self.found.kept[name]

    def size(self, name: str, cut: Cut) -> int:
        """Bytes of what is made, as if it were read."""
        rows, columns = _ranges(self.spec(name), cut)
        width = {"fp4": 0.5, "fp8": 1, "bf16": 2, "f32": 4, "i64": 8}[self.spec(name).storage]
        return int(len(rows) * len(columns) * width)

    def read(self, name: str, cut: Cut) -> Weight:
        """A rank's part of a tensor."""
        spec, config = self.spec(name), self.found.config
        rows, columns = _ranges(spec, cut)
        key = _key(self.found.seed or 0, name)
        if spec.storage == "i64":
            return _experts_of_ids(key, rows, spec.shape[1], config.num_experts, self.device)
        if spec.storage in _CODES:
            return self._packed(key, spec, rows, columns)
        mean, spread = _spread(name, spec)
        dtype = torch.float32 if spec.storage == "f32" else torch.bfloat16
        out = torch.empty((len(rows), len(columns)), dtype=dtype, device=self.device)
        table = (mean + spread * _quantiles(16)).to(self.device)
        for piece in _pieces(rows, 2 * len(columns)):
            index = _hashed(key, piece, range(2 * columns.start, 2 * columns.stop), self.device)
            found = table[index.contiguous().view(torch.int16).int() & 0xFFFF]
            out[piece.start - rows.start : piece.stop - rows.start] = found
        return out if len(spec.shape) == 2 else out[0]

    def _packed(self, key: int, spec: TensorSpec, rows: range, columns: range) -> Weight:
        kind = spec.storage
        high, wide = BLOCKS[kind]
        drawn = _hashed(key + 1, _blocks(rows, high), _blocks(columns, wide), self.device)
        byte = 127 + math.floor(math.log2(1 / _CODES[kind] / math.sqrt(spec.shape[1])))
        scales = (drawn & 1) + byte
        each = 2 if kind == "fp4" else 1
        at = range(columns.start // each, columns.stop // each)
        codes = torch.empty((len(rows), len(at)), dtype=torch.uint8, device=self.device)
        table = _fp8_codes().to(self.device)
        for piece in _pieces(rows, len(at)):
            made = _hashed(key, piece, at, self.device)
            made = made if kind == "fp4" else table[made.int()]
            codes[piece.start - rows.start : piece.stop - rows.start] = made
        if kind == "fp4":
            return Fp4Weight(codes, scales, torch.float32)
        return Fp8Weight(codes.view(torch.float8_e4m3fn), scales, torch.float32)


def _spread(name: str, spec: TensorSpec) -> tuple[float, float]:
    """Mean and spread of a tensor that is not quantised."""
    if name.endswith("norm.weight"):
        return 1, 0.1
    if name.endswith("_scale"):
        return 0.5, 0.1
    if name == "embed.weight":
        return 0, 1
    if name.endswith("gate.bias"):
        return 0, ROUTER_BIAS
    if name.endswith(("attn_sink", "ape", "_base")):
        return 0, 0.5
    return 0, spec.shape[-1] ** -0.5


def _ranges(spec: TensorSpec, cut: Cut) -> tuple[range, range]:
    """Rows and columns of what a rank keeps; a vector is one row."""
    sizes = [(0, n) for n in spec.shape]
    if cut is not None:
        axis, first, end = cut
        sizes[axis] = first, end
    rows, columns = sizes if len(sizes) == 2 else [(0, 1), *sizes]
    return range(*rows), range(*columns)


def _blocks(numbers: range, size: int) -> range:
    return range(numbers.start // size, -(-numbers.stop // size))


def _pieces(rows: range, width: int) -> Iterator[range]:
    """Runs of rows of so many bytes that fit a piece."""
    step = max(1, _PIECE // max(width, 1))
    for first in range(rows.start, rows.stop, step):
        yield range(first, min(first + step, rows.stop))


def _key(seed: int, name: str) -> int:
    """int64 of a tensor."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) >> 1


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


_ROW, _COLUMN = _signed(0x9E3779B97F4A7C15), _signed(0xD1B54A32D192ED03)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _hashed(key: int, rows: range, columns: range, device: torch.device) -> Tensor:
    """uint8 [rows, columns] of a table of random bytes without end, which is the same wherever one begins: splitmix64 of each
    8 of a row."""
    words = _blocks(columns, 8)
    x = torch.arange(rows.start, rows.stop, device=device)[:, None] * _ROW
    x = x + (torch.arange(words.start, words.stop, device=device) * _COLUMN + key)
    for shift, factor in _MIX:
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x.view(torch.uint8)[:, columns.start - 8 * words.start : columns.stop - 8 * words.start]


def _experts_of_ids(key: int, rows: range, choices: int, experts: int, device: torch.device) -> Tensor:
    """int64 [ids, choices]: different experts for each id, from one drawn on and a drawn step apart."""
    drawn = _hashed(key, rows, range(4), device).contiguous().view(torch.int16).long() & 0xFFFF
    first, step = drawn[:, :1], 1 + drawn[:, 1:] % max(1, experts // choices)
    return (first + step * torch.arange(choices, device=device)) % experts


@lru_cache
def _quantiles(bits: int) -> Tensor:
    """float32 [2 ** bits]: a number of the normal distribution for each of so many equal parts of it."""
    n = 1 << bits
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()


@lru_cache
def _fp8_codes() -> Tensor:
    """uint8 [256]: the e4m3 code of a byte."""
    return (_CODES["fp8"] * _quantiles(8)).to(torch.float8_e4m3fn).view(torch.uint8)
