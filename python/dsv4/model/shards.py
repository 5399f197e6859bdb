"""safetensors files: where each tensor lies, checked against the file, and reads of exactly those bytes. Without torch, so
that `dsv4 plan` and the checks before a start are quick.

Plain reads, no memory map: a file that shrinks meanwhile is an error, not a crash.
"""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dsv4._core import read_columns
from dsv4.errors import CheckpointError
from dsv4.model.json_fields import read_json
from dsv4.model.names import DTYPE_BYTES, canonical_name, is_buffer, stacked_experts

MAX_HEADER = 100_000_000
"""Largest header that is read, as in safetensors itself. The whole of Pro in one file has 20 MB."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: `size` bytes at `offset` of `file`. `dtype` is the name that safetensors has for
    it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    stride: int = 0
    """Bytes from row to row of a matrix of which these are some columns; 0: its rows lie together."""

    def rows(self, first: int, end: int) -> Stored:
        """Rows first .. end - 1 alone."""
        each = self.size // self.shape[0]
        at, size = self.offset + first * each, (end - first) * each
        return replace(self, shape=(end - first, *self.shape[1:]), offset=at, size=size)

    def columns(self, first: int, end: int) -> Stored:
        """Columns first .. end - 1 alone, of a matrix."""
        rows, width = self.shape
        each = self.size // (rows * width)
        return replace(
            self,
            shape=(rows, end - first),
            offset=self.offset + first * each,
            size=rows * (end - first) * each,
            stride=width * each,
        )


def index_checkpoint(path: Path, experts: int) -> dict[str, Stored]:
    """Released name -> place of every tensor, from the headers of all shards. Raises CheckpointError."""
    stored: dict[str, Stored] = {}
    with _collector_paused():
        for file in _files(path):
            for name, place in read_header(file).items():
                for canonical, part in _parts(canonical_name(name), place, experts):
                    if canonical in stored and not is_buffer(canonical):
                        first = stored[canonical].file.name
                        raise CheckpointError(
                            f"tensor {canonical} is there twice: in {first} and in {file.name}"
                        )
                    stored[canonical] = part
    return stored


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector: it took half of the time, looking for cycles in 70,000 header entries."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _files(path: Path) -> list[Path]:
    """The shards that the index names, or every .safetensors file where there is no index."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} has no .safetensors files")
        return files
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map")
    names = set(map(str, weight_map.values()))
    odd = next((n for n in names if Path(n).name != n or not n.endswith(".safetensors")), None)
    if odd is not None:
        raise CheckpointError(f"{index.name} names {odd!r}; shards are .safetensors files beside it")
    return [path / name for name in sorted(names)]


def _parts(name: str, place: Stored, experts: int) -> Iterable[tuple[str, Stored]]:
    """A tensor of stacked experts as one place per expert and projection; any other as it is."""
    pieces = stacked_experts(name, experts)
    if not pieces:
        return [(name, place)]
    shape = place.shape
    if len(shape) != 3 or shape[0] != experts or shape[0] * shape[1] % len(pieces):
        raise CheckpointError(
            f"tensor {name} has shape {list(shape)}; expected is one matrix per expert ({experts})"
        )
    step = place.size // len(pieces)
    part = replace(place, shape=(shape[0] * shape[1] // len(pieces), shape[2]), size=step)
    return [(piece, replace(part, offset=place.offset + i * step)) for i, piece in enumerate(pieces)]


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> place of a file's tensors; dtypes, shapes and offsets fit each other and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file.name} is truncated: it has {size} bytes and a header of {length}"
                )
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{file.name} has a header of {length} bytes; the limit is {MAX_HEADER}"
                )
            header = json.loads(f.read(length), object_pairs_hook=_no_duplicates)
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file.name} has a damaged header: {str(e)[:100]}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} has a damaged header: no object")
    header.pop("__metadata__", None)
    base = 8 + length
    places = {name: _place(file, name, info, base, size) for name, info in header.items()}
    end = base
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].size)):
        if place.offset < end:
            raise CheckpointError(f"{file.name}: tensor {name} overlaps the one before it")
        end = place.offset + place.size
    return places


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _place(file: Path, name: str, info: Any, base: int, size: int) -> Stored:
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        whole = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file.name}: tensor {name} has a damaged header entry")
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file.name}: tensor {name} has dtype {dtype}; known are {', '.join(DTYPE_BYTES)}"
        )
    wanted = prod(shape) * DTYPE_BYTES[dtype]
    if end - start != wanted:
        raise CheckpointError(
            f"{file.name}: tensor {name} has {end - start} bytes; {dtype} {list(shape)} takes {wanted}"
        )
    if base + end > size:
        raise CheckpointError(f"{file.name} is truncated: tensor {name} ends at byte {base + end} of {size}")
    return Stored(file, dtype, shape, base + start, end - start)


class ShardReader:
    """Reads bytes of tensors, for any number of threads; keeps the files open until it is left."""

    def __enter__(self) -> ShardReader:
        self._open: dict[Path, int] = {}
        self._opening = threading.Lock()
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, place: Stored) -> np.ndarray:
        """The stored bytes, uint8 [place.size]. Raises CheckpointError."""
        data = np.empty(place.size, np.uint8)
        if place.stride:
            return self._columns(place, data)
        view, done = memoryview(data), 0  # type: ignore[arg-type]
        try:
            fd = self._descriptor(place.file)
            while done < place.size:
                got = os.preadv(fd, [view[done:]], place.offset + done)
                if got == 0:
                    raise CheckpointError(f"{place.file.name} became shorter while it was read")
                done += got
        except OSError as e:
            raise CheckpointError(f"{place.file}: {e.strerror}") from None
        return data

    def _columns(self, place: Stored, data: np.ndarray) -> np.ndarray:
        try:
            whole = read_columns(place.file, place.offset, place.stride, data.reshape(place.shape[0], -1))
        except OSError as e:
            raise CheckpointError(f"{place.file}: {e.strerror or e}") from None
        if not whole:
            raise CheckpointError(f"{place.file.name} became shorter while it was read")
        return data

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]
