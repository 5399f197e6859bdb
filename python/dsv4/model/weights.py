"""A checkpoint's tensors, as floats or as they are stored, checked against the config before any big read.

Reads the released naming and formats, and what `save_pretrained` of transformers writes. Only .safetensors
and .json files are opened; no code of a model directory runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.model.config import ModelConfig
from dsv4.model.names import TensorSpec, expert_shapes, is_expert, scale_name, tensors
from dsv4.model.parallel import ALL, Share
from dsv4.model.shards import ShardReader, Stored
from dsv4.model.survey import BYTE_SCALES, QUANTISED, Survey, scale_bits, survey
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Packed, Weight, part

log = logging.getLogger("dsv4.weights")

Progress = Callable[[int, int, str], None]
"""Called after each tensor: bytes read, bytes in all, the tensor's name."""

_PACKED: dict[str, type[Fp4Weight] | type[Fp8Weight]] = {"fp4": Fp4Weight, "fp8": Fp8Weight}
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

_LARGE_SCALE = 240
"""From this byte (2^113) on a scaled value may leave float32; 255 is no number."""


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    packed: bool = False,
    device: torch.device | str = "cpu",
    draft: bool = False,
    found: Survey | None = None,
    share: Share = ALL,
) -> dict[str, Weight]:
    """All tensors of the model on `device` under their released names, `float` ones as `dtype` (float32 or bfloat16).

    FP8 and FP4 matrices are expanded, or, if `packed`, kept as they are stored (`ops.weight`) where `survey` says that they
    can be; experts are stacked as `layers.N.ffn.experts.w1|w3|w2` [E, out, in]; what the release stores as F32
    (hyper-connections, sinks, ape, gate bias) stays float32; tid2eid is int64. Draft tensors (`mtp.*`) come with
    `draft`, else they are skipped and their number is logged. `found`: the survey of `path`, if there is one already.
    `share`: the rank whose part of each tensor it is; runs of rows are read alone, and rows of which it keeps columns whole,
    as a disk would. Raises CheckpointError, ConfigError with one line.
    """
    found = found or survey(Path(path), config, draft=draft)
    stored, expected = found.stored, dict(tensors(config, draft=draft))
    skipped = [] if draft else [n for n in stored if n.startswith("mtp.")]
    if skipped:
        log.info("skipped %d draft tensors (mtp.*): speculation is off", len(skipped))
    cuts = {name: share.cut(name, _as_stored(name, found)) for name in expected}
    total, done = sum(_bytes(n, found, cuts[n]) for n in expected), 0
    weights = _expert_stacks(found, dtype, share, packed=packed, device=torch.device(device))
    with ShardReader() as reader:
        # in the order of the files, so that a disk reads forward
        for name in sorted(expected, key=lambda n: (stored[n].file, stored[n].offset)):
            value = _read(reader, name, found, cuts[name])
            if isinstance(value, Packed) and not packed:
                value = value.dense()
            _check_values(name, value, config)
            storage = expected[name].storage
            if storage == "i64":
                value = value.to(torch.int64)
            else:
                value = value.to(torch.float32 if storage == "f32" else dtype)
            _place(weights, name, value, device)
            done += _bytes(name, found, cuts[name])
            if progress is not None:
                progress(done, total, name)
    return weights


def expanded_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of what `load_weights` gives without `packed`."""
    width = {"f32": 4, "i64": 8}
    return sum(prod(spec.shape) * width.get(spec.storage, dtype.itemsize) for _, spec in tensors(config))


Cut = tuple[int, int, int] | None
"""(axis, first, end) of what a rank keeps of a matrix."""


def _places(name: str, found: Survey, cut: Cut) -> tuple[Stored, Stored | None]:
    """What is read: where the values lie, and the scales of quantised ones."""
    place = found.stored[name]
    scale = found.stored[scale_name(name)] if place.dtype in QUANTISED else None
    if cut is None or cut[0] != 0:
        return place, scale
    _, first, end = cut
    if scale is not None:
        block = _PACKED[QUANTISED[place.dtype]].sharing[0]
        scale = scale.rows(first // block, -(-end // block))
    return place.rows(first, end), scale


def _as_stored(name: str, found: Survey) -> TensorSpec:
    """The spec with the storage of the file, whose blocks of scales a cut must respect even where the matrix is expanded."""
    spec, dtype = found.kept[name], found.stored[name].dtype
    return replace(spec, storage=QUANTISED.get(dtype, spec.storage)) if spec.axis is not None else spec


def _bytes(name: str, found: Survey, cut: Cut) -> int:
    place, scale = _places(name, found, cut)
    return place.size + (scale.size if scale else 0)


def _read(reader: ShardReader, name: str, found: Survey, cut: Cut) -> Weight:
    """What a rank keeps of the stored values; a quantised matrix packed (decoding to float32), or expanded where it cannot
    be kept so."""
    value = _read_rows(reader, name, found, cut)
    if cut is None or cut[0] == 0:
        return value
    return part(value, *cut)


def _read_rows(reader: ShardReader, name: str, found: Survey, cut: Cut) -> Weight:
    place, scale = _places(name, found, cut)
    value = _tensor(reader, place)
    if scale is None:
        return value
    kind = _PACKED[QUANTISED[place.dtype]]
    if scale.dtype in BYTE_SCALES:
        return kind(value, _tensor(reader, scale), torch.float32)
    bits = torch.from_numpy(scale_bits(reader.read(scale), scale.dtype).view("int32")).view(scale.shape)
    if found.kept[name].storage == "bf16":
        return kind.decoded(value, bits.view(torch.float32))
    if not bits.all():  # a block of scale 0 is zeros, and E8M0 has no 0
        rows, columns = kind.block
        zero = (bits == 0).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        value.view(torch.uint8)[zero[: value.shape[0], : value.shape[1]]] = 0
    return kind(value, (bits >> 23).to(torch.uint8), torch.float32)


def _tensor(reader: ShardReader, place: Stored) -> Tensor:
    """As stored; E8M0, I8 and U8 as uint8."""
    return torch.from_numpy(reader.read(place)).view(_TORCH[place.dtype]).view(place.shape)


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
    found: Survey, dtype: torch.dtype, share: Share, *, packed: bool, device: torch.device
) -> dict[str, Weight]:
    """Room for the experts: packed where the survey says that a stack can be."""
    stacks: dict[str, Weight] = {}
    count = found.config.num_experts
    blocks = dict.fromkeys(n.partition(".experts.")[0] for n in found.kept if is_expert(n))
    for block in blocks:
        for proj, _ in expert_shapes(found.config):
            name = f"{block}.experts.0.{proj}.weight"
            shape, kind = share.of(name, found.kept[name]).shape, found.kept[name].storage
            if not packed or kind not in _PACKED:
                stack: Weight = torch.empty((count, *shape), dtype=dtype, device=device)
            else:
                (_, _, codes), (_, _, scales) = TensorSpec(shape, kind).stored(name)
                code = torch.uint8 if kind == "fp4" else torch.float8_e4m3fn
                stack = _PACKED[kind](
                    torch.empty((count, *codes), dtype=code, device=device),
                    torch.empty((count, *scales), dtype=torch.uint8, device=device),
                    dtype,
                )
            stacks[f"{block}.experts.{proj}"] = stack
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
