"""A checkpoint's tensors, as floats or as they are stored, checked against the config before any big read.

Reads the released naming and formats, and what `save_pretrained` of transformers writes. Only .safetensors
and .json files are opened; no code of a model directory runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from dsv4.errors import CheckpointError
from dsv4.model.config import ModelConfig
from dsv4.model.names import TensorSpec, expert_shapes, scale_name, tensors
from dsv4.model.shards import ShardReader, Stored, index_checkpoint
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Packed, Weight
from dsv4.spelling import nearest

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
_PACKED: dict[str, type[Packed]] = {"fp4": Fp4Weight, "fp8": Fp8Weight}

_NO_NUMBER = 255
"""The ue8m0 byte that is no number."""

_LARGE_SCALE = 240
"""From this byte (2^113) on a scaled value may leave float32."""


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    packed: bool = False,
    device: torch.device | str = "cpu",
    draft: bool = False,
) -> dict[str, Weight]:
    """All tensors of the model on `device` under their released names, `float` ones as `dtype` (float32 or bfloat16).

    FP8 and FP4 matrices are expanded, or, if `packed`, kept as they are stored (`ops.weight`), in the bytes of the file;
    experts are stacked as `layers.N.ffn.experts.w1|w3|w2` [E, out, in]; what the release stores as F32
    (hyper-connections, sinks, ape, gate bias) stays float32; tid2eid is int64. Draft tensors (`mtp.*`) come with
    `draft`, else they are skipped and their number is logged. Raises CheckpointError with one line.
    """
    stored = index_checkpoint(Path(path), config.num_experts)
    expected = dict(tensors(config, draft=draft))
    check_against(stored, expected)
    total, done = sum(s.size for n, s in stored.items() if draft or not n.startswith("mtp.")), 0
    weights = _expert_stacks(config, expected, stored, dtype, packed=packed, device=torch.device(device))
    with ShardReader() as reader:
        # in the order of the files, so that a disk reads forward
        for name in sorted(expected, key=lambda n: (stored[n].file, stored[n].offset)):
            source, scale = stored[name], stored.get(scale_name(name))
            value: Weight = reader.read(source)
            if scale is not None and source.dtype in _QUANTISED:
                value = _PACKED[_QUANTISED[source.dtype]](value, reader.read(scale), torch.float32)
                if not packed:
                    value = value.dense()
            _check_values(name, value, config)
            storage = expected[name].storage
            if storage != "i64":
                value = value.to(torch.float32 if storage == "f32" else dtype)
            _place(weights, name, value, device)
            done += source.size + (scale.size if scale else 0)
            if progress is not None:
                progress(done, total, name)
    return weights


def expanded_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of what `load_weights` gives without `packed`."""
    width = {"f32": 4, "i64": 8}
    return sum(prod(spec.shape) * width.get(spec.storage, dtype.itemsize) for _, spec in tensors(config))


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
    skipped = sum(n.startswith("mtp.") and n not in known for n in stored)
    extra = [n for n in stored if n not in known and not n.startswith("mtp.")]
    if extra:
        close_by = extra[0].rpartition(".")[0].rpartition(".")[0]  # of 70,000 names, a few to compare with
        experts = ".ffn.experts." in extra[0]
        candidates = (n for n in expected if n.startswith(close_by) and (".ffn.experts." in n) == experts)
        hint = nearest(extra[0], candidates)
        raise CheckpointError(f"tensor {extra[0]} does not belong to this model{hint}")
    if skipped:
        log.info("skipped %d draft tensors (mtp.*): speculation is off", skipped)


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


def _check_values(name: str, value: Weight, config: ModelConfig) -> None:
    """What shapes and dtypes cannot show: damage that would come out as wrong tokens or an index error."""
    if isinstance(value, Packed):
        if int(value.scales.max()) >= _LARGE_SCALE:
            _check_values(name, value.dense(), config)
        if isinstance(value, Fp8Weight) and (value.codes.view(torch.uint8) & 0x7F == 0x7F).any():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
    elif value.is_floating_point():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
    elif value.numel() and not 0 <= int(value.min()) <= int(value.max()) < config.num_experts:
        low, high = int(value.min()), int(value.max())
        raise CheckpointError(
            f"tensor {name} names experts {low} to {high}; the model has {config.num_experts}"
        )


def _expert_stacks(
    config: ModelConfig,
    expected: dict[str, TensorSpec],
    stored: dict[str, Stored],
    dtype: torch.dtype,
    *,
    packed: bool,
    device: torch.device,
) -> dict[str, Weight]:
    """Room for the experts: packed where all of a stack are stored alike."""
    stacks: dict[str, Weight] = {}
    blocks = dict.fromkeys(n.partition(".experts.")[0] for n in expected if ".experts." in n)
    for block in blocks:
        for part, shape in expert_shapes(config):
            prefix = f"{block}.experts."
            kinds = {stored[f"{prefix}{e}.{part}.weight"].dtype for e in range(config.num_experts)}
            kind = _QUANTISED.get(kinds.pop()) if packed and len(kinds) == 1 else None
            if kind is None:
                stack = torch.empty((config.num_experts, *shape), dtype=dtype, device=device)
            else:
                (_, _, codes), (_, _, scales) = TensorSpec(shape, kind).stored("")
                code = torch.uint8 if kind == "fp4" else torch.float8_e4m3fn
                stack = _PACKED[kind](
                    torch.empty((config.num_experts, *codes), dtype=code, device=device),
                    torch.empty((config.num_experts, *scales), dtype=torch.uint8, device=device),
                    dtype,
                )
            stacks[f"{prefix}{part}"] = stack
    return stacks


def _place(weights: dict[str, Weight], name: str, value: Weight, device: torch.device | str) -> None:
    """Into the dict, or into its expert's place in the stack."""
    head, _, tail = name.partition(".ffn.experts.")
    if not tail:
        weights[name] = value.to(device)
        return
    expert, part, _ = tail.split(".")
    stack = weights[f"{head}.ffn.experts.{part}"]
    if isinstance(stack, Packed):
        assert isinstance(value, Packed), "a stack is packed only where all its experts are"
        stack.codes[int(expert)], stack.scales[int(expert)] = value.codes, value.scales
    else:
        stack[int(expert)] = value.dense() if isinstance(value, Packed) else value
