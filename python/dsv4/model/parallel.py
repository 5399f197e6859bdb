"""How a model is laid over GPUs, as three numbers, and a rank's share of its tensors.

| | what it cuts | what each rank keeps whole |
| --- | --- | --- |
| `tp` | history (row j of a page on rank j mod tp), vocabulary, experts by column when `ep` is 1; attention heads where they are large | windows and compressor pools, low-rank and compressor weights, attention heads where they are small |
| `dp` | requests: each group of `tp` ranks serves its own | attention weights |
| `ep` | whole experts, over all `tp * dp` ranks | |

Along which axis a tensor is cut stands in the table of tensors (`names.py`). Planner, loader and model all ask `Share`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.names import TensorSpec, is_attention
from dsv4.row_sizes import FP4_BLOCK, FP8_BLOCK

BLOCKS = {"fp8": (FP8_BLOCK, FP8_BLOCK), "fp4": (1, FP4_BLOCK)}
"""Rows and columns of a matrix that share a scale, by storage."""


UNIT = 128
"""Tokens of a prompt that lie on one rank together."""

Cut = tuple[int, int, int] | None
"""(axis, first, end) of what a rank keeps of a matrix; None: all of it."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one of `ranks` ranks keeps of each tensor: an equal run along the tensor's axis (of a vocabulary that ranks do not
    divide, the last has less). `whole_attention`: it keeps attention weights whole and reads slices of them, so that prompts
    exchange no heads."""

    rank: int = 0
    ranks: int = 1
    whole_attention: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank is {self.rank}; of {self.ranks} ranks it must be 0 to {self.ranks - 1}")

    def bounds(self, size: int) -> tuple[int, int]:
        """First and end of this rank's run of `size`."""
        step = ceil(size / self.ranks)
        return min(self.rank * step, size), min((self.rank + 1) * step, size)

    def cut(self, name: str, spec: TensorSpec) -> Cut:
        """(axis, first, end) of what this rank keeps, or None where it keeps all. Raises ConfigError where that would divide
        numbers that share a scale unevenly."""
        axis = spec.axis
        if axis is None or self.ranks == 1 or (self.whole_attention and is_attention(name)):
            return None
        first, end = self.bounds(spec.shape[axis])
        block = BLOCKS.get(spec.storage, (1, 1))[axis]
        step = ceil(spec.shape[axis] / self.ranks)
        if step % block and (block % step or spec.storage == "fp4"):  # on every rank alike
            raise ConfigError(
                f"tensor parallel size is {self.ranks}; it cuts {name} every {step} of {spec.shape[axis]}, across "
                f"blocks of {block} that share a scale: take a divisor of {spec.shape[axis] // block}"
            )
        return axis, first, end

    def of(self, name: str, spec: TensorSpec) -> TensorSpec:
        """The piece of this rank."""
        cut = self.cut(name, spec)
        if cut is None:
            return spec
        axis, first, end = cut
        return replace(spec, shape=(*spec.shape[:axis], end - first, *spec.shape[axis + 1 :]))


ALL = Share()
"""Of one rank alone."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """`replicas` engines, each over `tp * dp` GPUs."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    replicas: int = 1

    @property
    def ranks(self) -> int:
        """GPUs of one engine."""
        return self.tp * self.dp

    @property
    def pools(self) -> int:
        """Page pools: the ranks of a `tp` group hold parts of the same pages."""
        return self.dp * self.replicas

    def __str__(self) -> str:
        parts = [f"TP{self.tp}" if self.tp > 1 or self.dp == 1 else "", f"DP{self.dp}" if self.dp > 1 else ""]
        parts.append(f"EP{self.ep}" if self.ep > 1 else "")
        name = " ".join(filter(None, parts))
        return f"{name} x {self.replicas}" if self.replicas > 1 else name


def choose(
    config: ModelConfig, num: int, tp: int | None = None, dp: int | None = None, ep: int | None = None
) -> Parallel:
    """The layout over `num` GPUs. What is not given follows: tp from num and dp, ep from dp. Raises ConfigError."""
    if num < 1:
        raise ConfigError(f"num is {num}; the smallest valid value is 1")
    dp = dp or 1
    tp = tp or max(1, num // dp)
    if num % (tp * dp):
        raise ConfigError(
            f"tp is {tp} and dp is {dp}; together they take {tp * dp} GPUs, which must divide num ({num})"
        )
    ranks = tp * dp
    ep = ep or (ranks if dp > 1 else 1)
    check(config, tp, ep, ranks)
    return Parallel(tp, dp, ep, num // ranks)


def check(config: ModelConfig, tp: int, ep: int, ranks: int) -> None:
    """Raises ConfigError for what cannot be cut evenly."""
    valid = valid_tp(config)
    if tp not in valid:
        raise ConfigError(f"tp is {tp}; for {config.name} it must be one of {', '.join(map(str, valid))}")
    if ep not in (1, ranks):
        raise ConfigError(
            f"ep is {ep}; it must be 1 (experts by column) or tp * dp = {ranks} (whole experts)"
        )
    if config.num_experts % ep:
        raise ConfigError(f"ep is {ep}; it must divide the {config.num_experts} experts")


def valid_tp(config: ModelConfig) -> tuple[int, ...]:
    """Ways to cut heads by whole output groups, and the columns of experts without dividing those that share a scale."""
    return tuple(
        n for n in range(1, config.o_groups + 1) if config.o_groups % n == 0 and _cuts_experts(config, n)
    )


def _cuts_experts(config: ModelConfig, n: int) -> bool:
    width, rest = divmod(config.moe_intermediate_size, n)
    if config.expert_dtype == "bf16":
        return rest == 0
    return rest == 0 and width % FP4_BLOCK == 0 and (width % FP8_BLOCK == 0 or FP8_BLOCK % width == 0)


def alternatives(config: ModelConfig, num: int) -> list[Parallel]:
    """Every layout worth comparing over `num` GPUs: each tp, with the rest as DP and EP, or as separate engines."""
    found = []
    for tp in reversed(valid_tp(config)):
        if num % tp:
            continue
        rest = num // tp
        found.append(Parallel(tp, replicas=rest))
        if rest > 1 and config.num_experts % num == 0:
            found.append(Parallel(tp, rest, num))
    return found
