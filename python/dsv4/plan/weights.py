"""Bytes of weights, in all and on one GPU, from the table of shapes that the loader uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.model.config import USUAL_EXPERTS, ModelConfig, told_experts
from dsv4.model.json_fields import Fields, read_json
from dsv4.model.names import DTYPE_BYTES, TensorSpec, is_expert, release_totals, tensors
from dsv4.model.parallel import Parallel, Share
from dsv4.model.source import RELEASED, has_weights
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4.model.survey import Survey

PUBLISHED = {
    "v4-flash": 166_878_536_440,
    "v4-flash-preview": 159_609_485_896,
    "v4-pro": 892_727_580_904,
    "v4-pro-preview": 864_704_792_696,
}
"""Bytes of tensor data of the releases, as their index files give them."""

HELD = ("released", "bfloat16", "float32")
"""How weights are kept in memory: quantised as released, or expanded when they are read."""

EXPERTS, ATTENTION = "routed experts", "attention"
WHOLE_ATTENTION = 6e9
"""Bytes of attention weights up to which every rank of a `tp` group keeps all of them (Flash 4.6 GB, Pro 18.3)."""
_GROUPS = (
    ("mtp.", "draft"),
    (".ffn.experts.", EXPERTS),
    (".shared_experts.", "shared experts"),
    (".indexer.", "indexers"),
    (".compressor.", "compressors"),
    (".attn.", ATTENTION),
    (".ffn.gate.", "gates"),
    ("hc_", "hyper-connections"),
    ("embed.", "embedding and head"),
    ("head.weight", "embedding and head"),
    ("norm.", "norms"),
)
"""Group of a tensor by the first of these that is in its name."""

_NUMBERS = re.compile(r"(?<=\.)\d+\.")

_DTYPE_NAMES = {
    "I8": "fp4",
    "F8_E4M3": "fp8",
    "F8_E8M0": "scales",
    "BF16": "bf16",
    "F32": "f32",
    "I64": "i64",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Equal tensors: their group, shape, and how they are cut."""

    group: str
    spec: TensorSpec
    expert: bool

    @property
    def axis(self) -> int | None:
        return self.spec.axis

    def on_rank(self, parallel: Parallel, *, whole_attention: bool = False) -> TensorSpec:
        """The piece of one rank; experts that are cut by number keep their shape."""
        if (self.expert and parallel.ep > 1) or (whole_attention and self.group == ATTENTION):
            return self.spec
        return Share(0, parallel.tp).of(self.group, self.spec)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model as they are kept, and the size of the checkpoint."""

    kinds: Counter[Kind]
    """How many tensors there are of each kind."""
    files: tuple[int, int]
    """Tensors and bytes of the files, drafters included."""
    notes: tuple[str, ...] = ()
    """What differs from a release, one line each."""

    @classmethod
    @lru_cache
    def released(cls, config: ModelConfig, *, draft: bool = False) -> Weights:
        """As the release of this config has them."""
        return cls(_count(tensors(config, draft=draft)), release_totals(config))

    @classmethod
    def found(cls, survey: Survey) -> Weights:
        """As the files have them."""
        return cls(_count(survey.kept.items()), (survey.tensors, survey.size), tuple(survey.describe()))


def find_weights(
    model: str,
    revision: str | None = None,
    *,
    draft: bool = False,
    num_layers: int | None = None,
    dummy: bool = False,
) -> tuple[ModelConfig, Weights, str]:
    """(config, weights, where they were counted) of MODEL as users write it: from the headers of its files where there are
    any, unless `dummy`. The last is empty for a release. `num_layers`: of its first layers alone. Raises ConfigError, CheckpointError."""
    config, path = ModelConfig.find(model, revision)
    config = config.first(num_layers)
    if path is not None and has_weights(path) and not dummy:
        from dsv4.model.survey import survey  # brings numpy

        found = survey(path, config, draft=draft)
        return found.config, Weights.found(found), f"the headers in {path} (files: {found.files})"
    beside = "weights are made up" if dummy else "there are no weights beside it"
    source = "" if path is None and model in RELEASED and not dummy else f"config.json; {beside}"
    if config.left_out and path is None and not dummy:
        source = f"the first {counted(config.num_layers, 'layer')} of the release, without {config.left_out}"
    weights = Weights.released(config, draft=draft)
    if path is not None or model not in RELEASED:
        weights = replace(weights, notes=assumed(path or Path(model).expanduser()))
    return config, weights, source


def assumed(path: Path) -> tuple[str, ...]:
    """What is taken for granted where the config of a directory, or a file with one, is all there is; one line each."""
    if told_experts(Fields(read_json(path / "config.json" if path.is_dir() else path))) is not None:
        return ()
    return (
        f"experts are taken as {USUAL_EXPERTS}, as config.json has no expert_dtype; where they are not, say it there: "
        '"expert_dtype": "fp8", or "bf16"',
    )


def _count(specs: Iterable[tuple[str, TensorSpec]]) -> Counter[Kind]:
    found: Counter[Kind] = Counter()
    for name, spec in specs:
        group, expert = _place(_NUMBERS.sub("", name))
        found[Kind(group, spec, expert)] += 1
    return found


@lru_cache
def _place(name: str) -> tuple[str, bool]:
    """(group, whether it is a routed expert's) of a name without its numbers."""
    return next((group for part, group in _GROUPS if part in name), "norms"), is_expert(name)


@dataclass(frozen=True, slots=True)
class WeightRow:
    """Bytes of a group's tensors in one dtype."""

    group: str
    dtype: str
    tensors: int
    total: int
    rank: int


def weight_rows(
    weights: Weights, parallel: Parallel, *, held: str, plain: str = "bfloat16"
) -> list[WeightRow]:
    """By group and dtype, in the order of the table; `held` is one of HELD. `plain`: dtype of what is not quantised, where
    the rest is as released."""
    sums: dict[tuple[str, str], list[int]] = {}
    whole = whole_attention(weights, held, plain)
    for kind, count in weights.kinds.items():
        here = count // parallel.ep if kind.expert else count
        for dtype, size in _sizes(kind.spec, held, plain):
            row = sums.setdefault((kind.group, dtype), [0, 0, 0])
            row[0] += count
            row[1] += count * size
        for dtype, size in _sizes(kind.on_rank(parallel, whole_attention=whole), held, plain):
            sums[kind.group, dtype][2] += here * size
    order = list(dict.fromkeys(group for _, group in _GROUPS))
    order = order[1:] + order[:1]
    keys = sorted(sums, key=lambda k: (order.index(k[0]), list(_DTYPE_NAMES.values()).index(k[1])))
    return [WeightRow(*key, *sums[key]) for key in keys]


def whole_attention(weights: Weights, held: str, plain: str = "bfloat16") -> bool:
    """Whether ranks keep attention weights whole, so that prompts exchange no heads."""
    kinds = ((kind, count) for kind, count in weights.kinds.items() if kind.group == ATTENTION)
    return (
        sum(count * size for kind, count in kinds for _, size in _sizes(kind.spec, held, plain))
        <= WHOLE_ATTENTION
    )


def _sizes(spec: TensorSpec, held: str, plain: str) -> Iterator[tuple[str, int]]:
    """(dtype, bytes) of what is kept of a tensor. What the release has in f32 or i64 stays so."""
    if spec.storage in ("f32", "i64") or (held == "released" and spec.storage != "bf16"):
        for _, dtype, shape in spec.stored("x.weight"):
            yield _DTYPE_NAMES[dtype], prod(shape) * DTYPE_BYTES[dtype]
    else:
        dtype = {"bfloat16": "bf16", "float32": "f32"}[plain if held == "released" else held]
        yield dtype, prod(spec.shape) * {"bf16": 2, "f32": 4}[dtype]
