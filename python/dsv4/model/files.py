"""Tensors of a checkpoint's files, read as far as a rank keeps them."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.model.names import TensorSpec, scale_name
from dsv4.model.parallel import Cut
from dsv4.model.shards import ShardReader, Stored
from dsv4.model.survey import BYTE_SCALES, QUANTISED, Survey, scale_bits
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Weight

PACKED: dict[str, type[Fp4Weight] | type[Fp8Weight]] = {"fp4": Fp4Weight, "fp8": Fp8Weight}
_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "I8": torch.uint8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_NO_NUMBER = 255
"""What E8M0 has for NaN; there is no infinity."""
_MOST_THREADS = 8
"""Enough to keep a disk or the page cache busy; a thread holds one tensor."""


class Files:
    """What a survey found. Any number of threads may read at a time."""

    def __init__(self, found: Survey) -> None:
        self.found, self.reader = found, ShardReader()
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = min(_MOST_THREADS, max(2, usable))

    def __enter__(self) -> Files:
        self.reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.__exit__(*error)

    def order(self, names: list[str]) -> list[str]:
        """In the order of the files, so that a disk reads forward."""
        stored = self.found.stored
        return sorted(names, key=lambda n: (stored[n].file, stored[n].offset))

    def spec(self, name: str) -> TensorSpec:
        """With the storage of the file, whose blocks of scales a cut must respect even where the matrix is expanded."""
        spec, dtype = self.found.kept[name], self.found.stored[name].dtype
        return replace(spec, storage=QUANTISED.get(dtype, spec.storage)) if spec.axis is not None else spec

    def size(self, name: str, cut: Cut) -> int:
        """Bytes that `read` reads."""
        place, scale = self._places(name, cut)
        return place.size + (scale.size if scale else 0)

    def read(self, name: str, cut: Cut) -> Weight:
        """What a rank keeps of the stored values; a quantised matrix packed (decoding to float32), or expanded where it cannot
        be kept so. Nothing else is read, of columns neither. Raises CheckpointError."""
        place, scale = self._places(name, cut)
        value = self._tensor(place)
        if scale is None:
            return value
        kind = PACKED[QUANTISED[place.dtype]]
        if scale.dtype in BYTE_SCALES:
            exponents = self._tensor(scale)
            if (exponents == _NO_NUMBER).any():
                raise CheckpointError(f"tensor {scale_name(name)} holds values that are not finite")
            return kind(value, exponents, torch.float32)
        raw = scale_bits(self.reader.read(scale), scale.dtype)
        bits = torch.from_numpy(raw.view("int32")).view(scale.shape)
        if self.found.kept[name].storage == "bf16":
            return kind.decoded(value, bits.view(torch.float32))
        if not bits.all():  # a block of scale 0 is zeros, and E8M0 has no 0
            rows, columns = kind.block
            zero = (bits == 0).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            value.view(torch.uint8)[zero[: value.shape[0], : value.shape[1]]] = 0
        return kind(value, (bits >> 23).to(torch.uint8), torch.float32)

    def _places(self, name: str, cut: Cut) -> tuple[Stored, Stored | None]:
        """What is read: where the values lie, and the scales of quantised ones."""
        place = self.found.stored[name]
        scale = self.found.stored[scale_name(name)] if place.dtype in QUANTISED else None
        if cut is None:
            return place, scale
        axis, first, end = cut
        run = Stored.columns if axis else Stored.rows
        each = self.found.kept[name].shape[axis] // place.shape[axis]  # numbers in a byte
        if scale is not None:
            block = PACKED[QUANTISED[place.dtype]].sharing[axis]
            scale = run(scale, first // block, -(-end // block))
        return run(place, first // each, end // each), scale

    def _tensor(self, place: Stored) -> Tensor:
        """As stored; E8M0, I8 and U8 as uint8."""
        return torch.from_numpy(self.reader.read(place)).view(_TORCH[place.dtype]).view(place.shape)
