"""safetensors files to float tensors, checked before any big read.

Reads the released naming and formats, and what `save_pretrained` of transformers writes. Only .safetensors and .json
files are opened, with plain reads: no code of a model directory runs, and a file that shrinks is an error, not a crash.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.formats import fp4_decode, fp4_unpack, ue8m0_decode
from dsv4.model.config import ModelConfig, read_json
from dsv4.model.names import (
    DTYPE_BYTES,
    FP4_BLOCK,
    FP8_BLOCK,
    TensorSpec,
    canonical_name,
    expert_shapes,
    scale_name,
    tensors,
)

log = logging.getLogger("dsv4.weights")

Progress = Callable[[int, int, str], None]

_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "I8": torch.uint8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
_PLAIN = ("BF16", "F32", "F16")
_ACCEPTED = {
    "fp8": ("F8_E4M3", *_PLAIN),
    "fp4": ("I8", "U8", "F8_E4M3", *_PLAIN),
    "bf16": _PLAIN,
    "f32": _PLAIN,
    "i64": ("I64",),
}
_MAX_HEADER = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def load_weights(
    path: str | Path, config: ModelConfig, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, Tensor]:
    """All tensors of the model under their released names, `float` ones as `dtype`.

    FP8 and FP4 matrices are expanded; experts are stacked as `layers.N.ffn.experts.w1|w3|w2` [E, out, in]; what the release
    stores as F32 (hyper-connections, sinks, ape, gate bias) stays float32; tid2eid is int64. Draft tensors (`mtp.*`) are
    skipped. Raises CheckpointError with one line.
    """
    stored = _index(Path(path))
    expected = dict(tensors(config))
    _compare(stored, expected)
    total, done = sum(s.size for n, s in stored.items() if not n.startswith("mtp.")), 0
    weights = _expert_stacks(config, dtype)
    with _Reader() as reader:
        for name, spec in expected.items():
            source, scale = stored[name], stored.get(scale_name(name))
            value = _expand(reader.read(source), reader.read(scale) if scale else None, source, name)
            target = value if spec.storage == "i64" else value.to(torch.float32 if spec.storage == "f32" else dtype)
            _place(weights, name, target)
            done += source.size + (scale.size if scale else 0)
            if progress is not None:
                progress(done, total, name)
    return weights


def _index(path: Path) -> dict[str, Stored]:
    """Canonical name -> place, from the headers of all shards."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no valid weight_map")
        files = [path / name for name in sorted(set(weight_map.values()))]
        outside = next((f for f in files if f.parent != path), None)
        if outside is not None:
            raise CheckpointError(f"{index} names {outside}, which lies outside the model directory")
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no .safetensors files")
    stored: dict[str, Stored] = {}
    for file in files:
        for name, place in read_header(file):
            name = canonical_name(name)
            if name in stored:
                raise CheckpointError(f"tensor {name} is in {stored[name].file.name} and in {file.name}")
            stored[name] = place
    return stored


def read_header(file: Path) -> Iterable[tuple[str, Stored]]:
    """Name and place of every tensor of a safetensors file; the header is checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file.name} is truncated or no safetensors file: header of {length} bytes in {size}")
            header = json.loads(f.read(length))
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file.name} has a damaged header") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} has a damaged header")
    header.pop("__metadata__", None)
    places = [(name, _place_of(file, name, info, 8 + length, size)) for name, info in header.items()]
    end = 8 + length
    for name, place in sorted(places, key=lambda item: (item[1].offset, item[1].size)):
        if place.offset < end:
            raise CheckpointError(f"{file.name}: tensor {name} overlaps the one before it")
        end = place.offset + place.size
    return places


def _place_of(file: Path, name: str, info: object, base: int, size: int) -> Stored:
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]  # type: ignore[index]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file.name}: tensor {name} has a damaged header entry")
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file.name}: tensor {name} has dtype {dtype}; known are {', '.join(DTYPE_BYTES)}")
    if end - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{file.name}: tensor {name} has {end - start} bytes, but {dtype} {list(shape)} takes another number")
    if base + end > size:
        raise CheckpointError(f"{file.name} is truncated: tensor {name} ends at byte {base + end} of {size}")
    return Stored(file, dtype, shape, base + start, end - start)


def _compare(stored: dict[str, Stored], expected: dict[str, TensorSpec]) -> None:
    """Every expected tensor is there with a dtype and shape that fit, and nothing else is."""
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"tensor {missing[0]}{more} of the model is missing from the checkpoint")
    scales = set()
    for name, spec in expected.items():
        place = stored[name]
        if place.dtype not in _ACCEPTED[spec.storage]:
            raise CheckpointError(f"tensor {name} has dtype {place.dtype}; expected is one of {', '.join(_ACCEPTED[spec.storage])}")
        as_stored = TensorSpec(spec.shape, {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8"}.get(place.dtype, "bf16")).stored(name)
        if place.shape != as_stored[0][2]:
            raise CheckpointError(f"tensor {name} has shape {list(place.shape)}; expected is {list(as_stored[0][2])}")
        for scale, dtype, shape in as_stored[1:]:
            found = stored.get(scale)
            if found is None:
                raise CheckpointError(f"tensor {scale} is missing: {name} is stored as {place.dtype} and needs its scales")
            if (found.dtype, found.shape) != (dtype, shape):
                raise CheckpointError(
                    f"tensor {scale} is {found.dtype} {list(found.shape)}; expected is {dtype} {list(shape)}"
                )
            scales.add(scale)
    extra = [n for n in stored if n not in expected and n not in scales and not n.startswith("mtp.")]
    if extra:
        close = difflib.get_close_matches(extra[0], expected, n=1)
        hint = f"; the nearest known name is {close[0]}" if close else ""
        raise CheckpointError(f"tensor {extra[0]} does not belong to this model{hint}")
    draft = sum(n.startswith("mtp.") for n in stored)
    if draft:
        log.info("skipped %d draft tensors (mtp.*): speculation is off", draft)


class _Reader:
    """Reads tensors with pread; keeps one file open."""

    def __enter__(self) -> _Reader:
        self._file: Path | None = None
        self._fd = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, place: Stored) -> Tensor:
        if place.file != self._file:
            self.__exit__()
            self._fd, self._file = os.open(place.file, os.O_RDONLY), place.file
        data, done = np.empty(place.size, np.uint8), 0
        while done < place.size:
            got = os.preadv(self._fd, [memoryview(data)[done:]], place.offset + done)
            if got == 0:
                raise CheckpointError(f"{place.file.name} became shorter while it was read")
            done += got
        return torch.from_numpy(data).view(_TORCH[place.dtype]).view(place.shape)


def _expand(value: Tensor, scale: Tensor | None, place: Stored, name: str) -> Tensor:
    """FP8 and FP4 to float32 with their scales; everything else as it is."""
    if place.dtype == "F8_E4M3" and scale is not None:
        wide = ue8m0_decode(scale).repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        expanded = value.float() * wide[: value.shape[0], : value.shape[1]]
    elif place.dtype in ("I8", "U8") and scale is not None:
        expanded = fp4_decode(fp4_unpack(value)) * ue8m0_decode(scale).repeat_interleave(FP4_BLOCK, 1)
    else:
        return value
    if not torch.isfinite(expanded).all():
        raise CheckpointError(f"tensor {name} holds values that are not finite")
    return expanded


def _expert_stacks(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"layers.{layer}.ffn.experts.{name}": torch.empty((config.num_experts, *shape), dtype=dtype)
        for layer in range(config.num_layers)
        for name, shape in expert_shapes(config)
    }


def _place(weights: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Into the dict, or into its expert's place in the stack."""
    head, _, tail = name.partition(".ffn.experts.")
    if not tail:
        weights[name] = value
        return
    expert, part, _ = tail.split(".")
    weights[f"{head}.ffn.experts.{part}"][int(expert)] = value
