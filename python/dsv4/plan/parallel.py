"""How a model is laid over GPUs, as three numbers.

| | what it cuts | what each rank keeps whole |
| --- | --- | --- |
| `tp` | attention heads, dense columns, vocabulary; experts by column when `ep` is 1 | history (V4 has one KV head), low-rank and compressor weights |
| `dp` | requests: each group of `tp` ranks serves its own | attention weights |
| `ep` | whole experts, over all `tp * dp` ranks | |
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.row_sizes import FP8_BLOCK


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
        """Page pools that hold different tokens: the ranks of a `tp` group hold the same."""
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
    """Ways to cut heads by whole output groups and intermediate columns by whole scale blocks."""
    columns = max(1, config.moe_intermediate_size // FP8_BLOCK)
    return tuple(n for n in range(1, config.o_groups + 1) if config.o_groups % n == 0 and columns % n == 0)


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
