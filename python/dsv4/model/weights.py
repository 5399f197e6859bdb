"""A checkpoint's tensors as floats, checked against the config before any big read.

Reads the released naming and formats, and what `save_pretrained` of transformers writes. Only .safetensors
and .json files are opened; no code of a model directory runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.formats import fp4_decode, fp4_unpack, ue8m0_decode
from dsv4.model.config import ModelConfig
from dsv4.model.json_fields import nearest
from dsv4.model.names import FP4_BLOCK, FP8_BLOCK, TensorSpec, expert_shapes, scale_name, tensors
from dsv4.model.shards import ShardReader, Stored, index_checkpoint

log = logging.getLogger("dsv4.weights")

Progress = Callable[[int, int, str], None]
"""Called after each tensor: bytes read, bytes in all, the tensor's name."""

_PLAIN = ("BF16", "F32", "F16")
_ACCEPTED = {
    "fp8": ("F8_E4M3", *_PLAIN),
    "fp4": ("I8", "U8", "F8_E4M3", *_PLAIN),
    "bf16": _PLAIN,
    "f32": _PLAIN,
    "i64": ("I64",),
}
"""What a file may hold for a tensor that the release stores as ...: a wider form is as good."""

_QUANTISED = {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8"}


def load_weights(
    path: str | Path, config: ModelConfig, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, Tensor]:
    """All tensors of the model under their released names, `float` ones as `dtype` (float32 or bfloat16).

    FP8 and FP4 matrices are expanded; experts are stacked as `layers.N.ffn.experts.w1|w3|w2` [E, out, in];
    what the release stores as F32 (hyper-connections, sinks, ape, gate bias) stays float32; tid2eid is int64.
    Draft tensors (`mtp.*`) are skipped, their number is logged. Raises CheckpointError with one line.
    """
    stored = index_checkpoint(Path(path), config.num_experts)
    expected = dict(tensors(config))
    check_against(stored, expected)
    total, done = sum(s.size for n, s in stored.items() if not n.startswith("mtp.")), 0
    weights = _expert_stacks(config, dtype)
    with ShardReader() as reader:
        # in the order of the files, so that a disk reads forward
        for name in sorted(expected, key=lambda n: (stored[n].file, stored[n].offset)):
            source, scale = stored[name], stored.get(scale_name(name))
            value = _expand(reader.read(source), reader.read(scale) if scale else None, source.dtype)
            _check_values(name, value, config)
            storage = expected[name].storage
            if storage != "i64":
                value = value.to(torch.float32 if storage == "f32" else dtype)
            _place(weights, name, value)
            done += source.size + (scale.size if scale else 0)
            if progress is not None:
                progress(done, total, name)
    return weights


def check_against(stored: dict[str, Stored], expected: dict[str, TensorSpec]) -> None:
    """Every expected tensor is there with a dtype and shape that fit, and nothing else is, draft tensors
    apart. Raises CheckpointError."""
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"tensor {missing[0]}{more} of the model is missing from the checkpoint")
    known = set(expected)
    for name, spec in expected.items():
        known |= _check_tensor(name, spec, stored)
    draft = sum(n.startswith("mtp.") for n in stored)
    extra = [n for n in stored if n not in known and not n.startswith("mtp.")]
    if extra:
        close_by = extra[0].rpartition(".")[0].rpartition(".")[0]  # of 70,000 names, a few to compare with
        experts = ".ffn.experts." in extra[0]
        candidates = (n for n in expected if n.startswith(close_by) and (".ffn.experts." in n) == experts)
        hint = nearest(extra[0], candidates)
        raise CheckpointError(f"tensor {extra[0]} does not belong to this model{hint}")
    if draft:
        log.info("skipped %d draft tensors (mtp.*): speculation is off", draft)


def _check_tensor(name: str, spec: TensorSpec, stored: dict[str, Stored]) -> set[str]:
    """Checks a tensor and its scales, if it needs any; returns the names of the latter."""
    place = stored[name]
    if place.dtype not in _ACCEPTED[spec.storage]:
        accepted = ", ".join(_ACCEPTED[spec.storage])
        raise CheckpointError(f"tensor {name} has dtype {place.dtype}; expected is one of {accepted}")
    (_, _, shape), *scales = TensorSpec(spec.shape, _QUANTISED.get(place.dtype, "bf16")).stored(name)
    if place.shape != shape:
        raise CheckpointError(f"tensor {name} has shape {list(place.shape)}; expected is {list(shape)}")
    for scale, dtype, shape in scales:
        found = stored.get(scale)
        if found is None:
            raise CheckpointError(f"tensor {scale} is missing: {name} is {place.dtype} and needs its scales")
        if (found.dtype, found.shape) != (dtype, shape):
            raise CheckpointError(
                f"tensor {scale} is {found.dtype} {list(found.shape)}; expected is {dtype} {list(shape)}"
            )
    return {scale for scale, _, _ in scales}


def _expand(value: Tensor, scale: Tensor | None, dtype: str) -> Tensor:
    """FP8 and FP4 to float32 with their scales; everything else as it is."""
    if scale is None:
        return value
    if dtype == "F8_E4M3":
        wide = ue8m0_decode(scale).repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return value.float() * wide[: value.shape[0], : value.shape[1]]
    return fp4_decode(fp4_unpack(value)) * ue8m0_decode(scale).repeat_interleave(FP4_BLOCK, 1)


def _check_values(name: str, value: Tensor, config: ModelConfig) -> None:
    """What shapes and dtypes cannot show: damage that would come out as wrong tokens or an index error."""
    if value.is_floating_point():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
    elif value.numel() and not 0 <= int(value.min()) <= int(value.max()) < config.num_experts:
        low, high = int(value.min()), int(value.max())
        raise CheckpointError(
            f"tensor {name} names experts {low} to {high}; the model has {config.num_experts}"
        )


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
