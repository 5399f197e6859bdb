"""Writes a checkpoint in the release format: released names, FP8 and FP4 matrices with their scales, and the
rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.formats import E4M3_MAX, FP4_MAX, fp4_encode, fp4_pack, pow2_ceil, ue8m0_encode
from dsv4.model.config import ModelConfig
from dsv4.model.names import TensorSpec, scale_name, tensors
from dsv4.row_sizes import FP4_BLOCK, FP8_BLOCK

_TINY = 1e-10
"""Smallest largest-value of a block, so that blocks of zeros have a scale."""

_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}


def export_release(
    weights: Mapping[str, Tensor], config: ModelConfig, raw: Mapping[str, Any], path: Path, shards: int = 1
) -> None:
    """Quantises `weights` (released names, experts stacked, any float dtype) and writes shards, index and
    `raw` as config.json. Draft tensors are written where `weights` has them.

    Values that already lie on a format's grid come back exactly from `load_weights`. Raises CheckpointError
    for a tensor that is missing or has another shape than the config gives it.
    """
    path.mkdir(parents=True, exist_ok=True)
    draft = any(name.startswith("mtp.") for name in weights)
    files: dict[str, Tensor] = {}
    for name, spec in tensors(config, draft=draft):
        files |= _stored(name, spec, _checked(weights, name, spec))
    names = list(files)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(_split(names, shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: files[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in files.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(dict(raw), indent=1))


def _split(names: list[str], shards: int) -> Iterator[list[str]]:
    """Runs of names of nearly equal length, one per shard."""
    for i in range(shards):
        yield names[len(names) * i // shards : len(names) * (i + 1) // shards]


def _checked(weights: Mapping[str, Tensor], name: str, spec: TensorSpec) -> Tensor:
    """The tensor, or one expert's part of a stack."""
    head, _, tail = name.partition(".ffn.experts.")
    expert, _, rest = tail.partition(".")
    source = f"{head}.ffn.experts.{rest.removesuffix('.weight')}" if tail else name
    if source not in weights:
        raise CheckpointError(f"tensor {source} is missing from the weights")
    value = weights[source][int(expert)] if tail else weights[source]
    if tuple(value.shape) != spec.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(value.shape)}; the config gives {list(spec.shape)}"
        )
    if spec.storage == "fp4" and value.shape[1] % FP4_BLOCK:
        raise CheckpointError(
            f"tensor {name} has rows of {value.shape[1]}; FP4 needs a multiple of {FP4_BLOCK}"
        )
    return value


def _stored(name: str, spec: TensorSpec, value: Tensor) -> dict[str, Tensor]:
    """What lies in the file for a tensor, by name."""
    quantise = {"fp8": quantise_fp8, "fp4": quantise_fp4}.get(spec.storage)
    if quantise is None:
        return {name: value.to(_DTYPES[spec.storage]).contiguous()}
    codes, scales = quantise(value)
    return {name: codes, scale_name(name): scales}


def quantise_fp8(value: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> e4m3 [out, in] and ue8m0 scales [ceil(out / 128), ceil(in / 128)]; edge blocks may be
    smaller."""
    out, width = value.shape
    rows, columns = -(-out // FP8_BLOCK), -(-width // FP8_BLOCK)
    padding = (0, columns * FP8_BLOCK - width, 0, rows * FP8_BLOCK - out)
    padded = torch.nn.functional.pad(value.float(), padding)
    blocks = padded.unflatten(0, (rows, FP8_BLOCK)).unflatten(2, (columns, FP8_BLOCK))
    scale = pow2_ceil(blocks.abs().amax((1, 3)).clamp(min=_TINY) / E4M3_MAX)
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:out, :width]
    return codes.to(torch.float8_e4m3fn).contiguous(), ue8m0_encode(scale).view(torch.float8_e8m0fnu)


def quantise_fp4(value: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> packed e2m1 [out, in / 2] (int8) and ue8m0 scales [out, in / 32]."""
    blocks = value.float().unflatten(1, (-1, FP4_BLOCK))
    scale = pow2_ceil(blocks.abs().amax(-1).clamp(min=_TINY) / FP4_MAX)
    packed = fp4_pack(fp4_encode(blocks / scale[..., None]).flatten(1))
    return packed.view(torch.int8).contiguous(), ue8m0_encode(scale).view(torch.float8_e8m0fnu)
