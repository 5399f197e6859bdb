"""What a checkpoint directory holds, from the headers of its files: every tensor of the model, how the loader keeps it, and
what differs from the release. `dsv4 plan` and the engine both ask here, so they cannot disagree. Without torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.errors import CheckpointError
from dsv4.model.config import ModelConfig
from dsv4.model.names import TensorSpec, is_buffer, is_expert, scale_name, tensors
from dsv4.model.quantization import check_tensors, foreign
from dsv4.model.shards import ShardReader, Stored, index_checkpoint
from dsv4.quantities import counted
from dsv4.spelling import nearest

PLAIN = ("BF16", "F32", "F16")
"""Dtypes of weights that are not quantised."""

FLOAT_SCALES = PLAIN
BYTE_SCALES = ("F8_E8M0", "U8")
"""Dtypes of scales: numbers, or biased exponents."""

QUANTISED = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4"}
"""Storage of a matrix by the dtype of its codes."""

_ACCEPTED = {
    "fp8": ("F8_E4M3", *PLAIN),
    "expert": ("I8", "U8", "F8_E4M3", *PLAIN),
    "bf16": PLAIN,
    "f32": PLAIN,
    "i64": ("I64", "I32"),
}
"""What a file may hold for a tensor that the release stores as ...: a wider form is as good."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint that was found whole."""

    config: ModelConfig
    """As given, but `expert_dtype` is that of the files."""
    stored: Mapping[str, Stored]
    """Released name -> place, of every tensor in the files."""
    kept: Mapping[str, TensorSpec]
    """Every tensor of the model (`mtp.*` only on demand) in the storage in which `load_weights` keeps it if `packed`."""
    rescaled: tuple[str, ...]
    """Matrices whose scales are numbers, all of them powers of two: kept packed, with E8M0 scales."""
    expanded: tuple[str, ...]
    """Quantised matrices that cannot be kept packed."""
    buffers: int
    """Tensors that are no weights and are left out."""
    asked: str
    """`expert_dtype` of config.json."""
    seed: int | None = None
    """Of the weights that are made up in place of files (`dummy.py`); None: there are files."""

    @property
    def files(self) -> int:
        return len({place.file for place in self.stored.values()})

    @property
    def tensors(self) -> int:
        return len(self.stored)

    @property
    def size(self) -> int:
        """Bytes of all tensors in the files, drafters included."""
        return sum(place.size for place in self.stored.values())

    def describe(self, width: int = 2, *, packed: bool = True) -> list[str]:
        """What differs from the release, one line each. `width`: bytes of an expanded number; not `packed`: all of them
        are."""
        lines = []
        if self.seed is not None:
            lines.append(
                f"made up from seed {self.seed} in the release's formats: answers mean nothing (--load-format dummy)"
            )
        if self.config.left_out:
            lines.append(
                f"left out: {counted(self.config.left_out, 'layer')} (--num-layers {self.config.num_layers})"
            )
        if self.config.expert_dtype not in (self.asked, "bf16"):
            lines.append(
                f"experts are {self.config.expert_dtype} in the files; config.json means {self.asked}"
            )
        if not packed and (self.rescaled or self.expanded):
            count = len(self.rescaled) + len(self.expanded)
            lines.append(
                f"scales in F32 or BF16, or experts stored unlike each other: {counted(count, 'matrix', 'matrices')}, expanded as all are"
            )
        elif self.rescaled:
            lines.append(
                f"{_some(self.rescaled)}: scales are powers of two written as numbers; packed with E8M0 scales, exactly"
            )
        if packed and self.expanded:
            grown = sum(np.prod(self.kept[n].shape) * width - self.stored[n].size for n in self.expanded)
            lines.append(
                f"{_some(self.expanded)} cannot stay packed (scales that are no powers of two, or experts stored unlike "
                f"each other): expanded, {grown / 1e6:,.1f} MB more than in the files"
            )
        if self.buffers:
            lines.append(
                f"left out: {counted(self.buffers, 'buffer')} (such as rotary_emb.inv_freq), which the engine computes"
            )
        return lines


def _some(names: tuple[str, ...]) -> str:
    """`3 matrices (layers.0.attn.wq_a.weight, ...)`."""
    more = ", ..." if len(names) > 1 else ""
    return f"{counted(len(names), 'matrix', 'matrices')} ({names[0]}{more})"


def survey(path: Path, config: ModelConfig, *, draft: bool = False) -> Survey:
    """The survey of a directory. Raises CheckpointError, as `examine` does."""
    return examine(index_checkpoint(path, config.num_experts), config, draft=draft)


def without_files(config: ModelConfig, seed: int) -> Survey:
    """What `survey` would find if there were files as the release has them."""
    return Survey(
        config,
        stored={},
        kept=dict(tensors(config)),
        rescaled=(),
        expanded=(),
        buffers=0,
        asked=config.expert_dtype,
        seed=seed,
    )


def examine(found: Mapping[str, Stored], config: ModelConfig, *, draft: bool = False) -> Survey:
    """Raises CheckpointError where a tensor is missing, foreign, of another shape or dtype, or of a quantisation that is
    not supported. Of the files only scales that are numbers are read."""
    check_tensors(found)
    of_model = {n: place for n, place in found.items() if not _is_left_out(n, config)}
    stored = {name: place for name, place in of_model.items() if not is_buffer(name)}
    expected = dict(tensors(config, draft=draft))
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"tensor {missing[0]}{more} of the model is missing from the checkpoint")
    storage = {name: _storage(name, spec, stored) for name, spec in expected.items()}
    _refuse_others(stored, storage)
    floats = [n for n, kind in storage.items() if _scale_dtype(n, kind, stored) in FLOAT_SCALES]
    exact = _powers_of_two(floats, stored)
    expanded = {n for n in floats if n not in exact}
    expanded |= _mixed_stacks(storage, expanded)
    kept = {
        name: dataclasses.replace(spec, storage="bf16" if name in expanded else storage[name])
        for name, spec in expected.items()
    }
    experts = Counter(
        kind for name, kind in storage.items() if is_expert(name) and not name.startswith("mtp.")
    )
    asked, config = (
        config.expert_dtype,
        dataclasses.replace(config, expert_dtype=experts.most_common(1)[0][0]),
    )
    return Survey(
        config=config,
        stored=stored,
        kept=kept,
        rescaled=tuple(n for n in floats if n not in expanded),
        expanded=tuple(n for n in expected if n in expanded and storage[n] in ("fp8", "fp4")),
        buffers=len(of_model) - len(stored),
        asked=asked,
    )


def _is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a layer that `--num-layers` leaves out."""
    if not config.left_out or not name.startswith("layers."):
        return False
    layer = name.split(".", 2)[1]
    return layer.isdecimal() and 0 <= int(layer) - config.num_layers < config.left_out


def _refuse_others(stored: Mapping[str, Stored], storage: Mapping[str, str]) -> None:
    """What is neither the model's nor the drafter's is named, with the nearest that is."""
    scales = {scale_name(name) for name, kind in storage.items() if kind in ("fp8", "fp4")}
    other = next(
        (n for n in stored if n not in storage and n not in scales and not n.startswith("mtp.")), None
    )
    if other is not None:
        close_by = other.rpartition(".")[0].rpartition(".")[0]  # of 70,000 names, a few to compare with
        candidates = (n for n in storage if n.startswith(close_by) and is_expert(n) == is_expert(other))
        raise CheckpointError(f"tensor {other} does not belong to this model{nearest(other, candidates)}")


def _storage(name: str, spec: TensorSpec, stored: Mapping[str, Stored]) -> str:
    """How a tensor is stored, after a look at its shape and dtype and at those of its scales."""
    place = stored[name]
    accepted = _ACCEPTED["expert" if is_expert(name) else spec.storage]
    if place.dtype in ("I8", "U8") and place.shape == spec.shape and len(spec.shape) == 2:
        raise foreign(name, "INT8")
    if place.dtype not in accepted:
        raise CheckpointError(
            f"tensor {name} has dtype {place.dtype}; expected is one of {', '.join(accepted)}"
        )
    kind = QUANTISED.get(place.dtype, "plain")
    (_, _, shape), *scales = TensorSpec(spec.shape, "bf16" if kind == "plain" else kind).stored(name)
    if place.shape != shape:
        raise CheckpointError(f"tensor {name} has shape {list(place.shape)}; expected is {list(shape)}")
    for scale, _, shape in scales:
        _check_scale(name, stored, scale, shape)
    if kind == "plain":
        return "bf16" if spec.storage in ("fp8", "fp4") else spec.storage
    return kind


def _check_scale(name: str, stored: Mapping[str, Stored], scale: str, shape: tuple[int, ...]) -> None:
    found, dtype = stored.get(scale), stored[name].dtype
    if found is None:
        raise CheckpointError(f"tensor {scale} is missing: {name} is {dtype} and needs its scales")
    if found.dtype == "F8_E4M3" and dtype in ("I8", "U8"):
        raise foreign(scale, "NVFP4")
    if found.dtype not in (*BYTE_SCALES, *FLOAT_SCALES) or found.shape != shape:
        raise CheckpointError(
            f"tensor {scale} is {found.dtype} {list(found.shape)}; expected is F8_E8M0, F32 or BF16 {list(shape)}"
        )


def _scale_dtype(name: str, kind: str, stored: Mapping[str, Stored]) -> str | None:
    return stored[scale_name(name)].dtype if kind in ("fp8", "fp4") else None


def scale_bits(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of scales that are numbers as float32, uint32 [n], from their stored bytes. A power of two has nothing but an
    exponent in them, which is its E8M0 byte."""
    if dtype == "BF16":
        return raw.view(np.uint16).astype(np.uint32) << 16
    return (raw.view(np.float16).astype(np.float32) if dtype == "F16" else raw).view(np.uint32)


def _powers_of_two(names: Iterable[str], stored: Mapping[str, Stored]) -> set[str]:
    """Matrices all of whose scales are powers of two, or zero. Raises CheckpointError for one that is no number, or below zero."""
    exact = set()
    with ShardReader() as reader:
        for name in names:
            place = stored[scale := scale_name(name)]
            bits = scale_bits(reader.read(place), place.dtype)
            if ((bits >> 23) & 0xFF == 0xFF).any():
                raise CheckpointError(f"tensor {scale} holds values that are not finite")
            if (least := bits.max(initial=0)) > 0x8000_0000:  # the sign is the highest bit
                value = least.view(np.float32)
                raise CheckpointError(f"tensor {scale} holds {value:.4g}; scales are above zero, or zero")
            if not (bits & 0x807F_FFFF).any():
                exact.add(name)
    return exact


def _mixed_stacks(storage: Mapping[str, str], expanded: set[str]) -> set[str]:
    """Experts of stacks that are not stored alike throughout: they are kept as numbers, as the others of the stack are."""
    stacks: dict[tuple[str, str], dict[str, str]] = {}
    for name, kind in storage.items():
        if is_expert(name):
            block, _, rest = name.partition(".experts.")
            stacks.setdefault((block, rest.split(".")[1]), {})[name] = "bf16" if name in expanded else kind
    return {n for members in stacks.values() if len(set(members.values())) > 1 for n in members}
