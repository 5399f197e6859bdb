"""How many ranks an engine has: what the settings say, or the least that hold the model. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsv4.config import EngineConfig
from dsv4.errors import ConfigError
from dsv4.model.layout import LayerSpec, block_size
from dsv4.model.names import TensorSpec, is_attention
from dsv4.model.parallel import BLOCKS, Share, valid_tp
from dsv4.model.survey import QUANTISED, Survey

_OUTPUT = {"wo_a": 0, "wo_b": 1}
"""Attention matrices that are kept whole and read in parts, along these axes."""


def check_ranks(config: EngineConfig, found: Survey) -> None:
    """Raises ConfigError where the model cannot be cut over so many ranks."""
    ranks = config.tensor_parallel_size or 1
    if ranks == 1:
        return
    valid = ranks_of(found)
    if ranks not in valid:
        nearest = min(valid, key=lambda n: (abs(n - ranks), -n))
        model = found.config
        raise ConfigError(
            f"tensor_parallel_size is {ranks}; {model.name} has {model.num_heads} heads in {model.o_groups} groups and "
            f"{model.moe_intermediate_size} columns an expert, which can be cut over {_several(valid)}; the nearest is {nearest}"
        )


def ranks_of(found: Survey) -> tuple[int, ...]:
    """Every number of ranks that a model can be cut over."""
    kinds = dict.fromkeys(_cut_specs(found))
    return tuple(n for n in valid_tp(found.config) if all(_divides(n, *kind) for kind in kinds))


def can_share(layers: Sequence[LayerSpec], block: int | None, ranks: int) -> bool:
    """Whether so many ranks can have equal parts of pages of `block` tokens (None: of any)."""
    try:
        block_size(layers, block, ranks)
    except ConfigError:
        return False
    return True


def threads_of(ranks: int, cores: int) -> int:
    """Threads of a rank on the CPU: as many on all, so that all get the same bits."""
    return max(1, cores // ranks)


def _cut_specs(found: Survey) -> Iterator[tuple[str, TensorSpec]]:
    """(name, spec) of one tensor of each kind that is cut, stored as in the files."""
    seen = set()
    for name, spec in found.kept.items():
        part = name.rpartition(".weight")[0].rpartition(".")[2]
        axis = _OUTPUT.get(part, spec.axis) if is_attention(name) else spec.axis
        if axis is None or (is_attention(name) and part not in _OUTPUT):
            continue
        place = found.stored.get(name)  # None: weights are made up
        storage = spec.storage if place is None else QUANTISED.get(place.dtype, spec.storage)
        stored = replace(spec, axis=axis, storage=storage)
        if (key := (part, stored)) not in seen:
            seen.add(key)
            yield name, stored


def _divides(ranks: int, name: str, spec: TensorSpec) -> bool:
    if is_attention(name):
        axis = spec.axis or 0
        step, rest = divmod(spec.shape[axis], ranks)
        block = BLOCKS.get(spec.storage, (1, 1))[axis]
        return rest == 0 and (step % block == 0 or block % step == 0)
    try:
        Share(0, ranks).cut(name, spec)
    except ConfigError:
        return False
    return True


def _several(valid: tuple[int, ...]) -> str:
    shown = [f"{n}" for n in valid]
    return f"{shown[0]} rank" if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]} ranks"
