"""How long a step takes: a model on some GPUs as the coefficients of the core's step model, in microseconds.

Bytes come from the checkpoint's table of tensors and the cache's layout, rates from `dsv4.gpus`, and what part of a
rate each kind of kernel gets from `Shares`. The formula is in `rust/sim/src/replay/clock.rs`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from dsv4.errors import ConfigError
from dsv4.gpus import Gpu
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import Parallel
from dsv4.plan.weights import EXPERTS, Weights, weight_rows
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4._core import Component, LayoutSpec


@dataclass(frozen=True, slots=True)
class Shares:
    """What a kernel gets: of the bandwidth that a copy gets, or of nominal arithmetic. Overridable one by one."""

    weight_read: float = 0.90
    """Copy bandwidth, weights at decode: FP4 experts reach 0.6 at 1 token, 0.92 at 8, 1.0 from 32 on (H100)."""
    index_read: float = 0.75
    """Copy bandwidth, index scan with its top-k: the scan reaches 0.7 to 0.99, top-k adds 10 to 20% (H100)."""
    row_read: float = 0.40
    """Copy bandwidth, gathered rows at decode: FlashMLA 0.35, the kernels of this repository up to 0.53 (H100)."""
    linear: float = 0.45
    """FP8 arithmetic, linear layers and experts at prefill: Mega MoE 0.45 at 32K tokens, DeepGEMM dense 0.78."""
    index: float = 0.50
    """FP8 arithmetic, index scores at prefill: assumed, no figure is published."""
    attention: float = 0.60
    """BF16 arithmetic, sparse prefill: FlashMLA 0.65 (H800) and 0.64 (B200)."""
    kernel_us: float = 4.0
    """A small kernel inside a CUDA graph (empty one: 3.5 to 4.0 on an H100)."""
    kernels_per_layer: float = 15.0
    """Launches of a layer that do nothing but wait for each other: assumed."""
    collective_us: float = 6.6
    """An all-reduce of 64 KiB in symmetric memory over two H200."""
    collective_bytes_per_s: float = 218e9
    """All-reduce of 16 MiB with NCCL over two H200: 77 us."""
    copy_launch_us: float = 5.0
    """Launch of a state's copy."""


def step_coefficients(
    config: ModelConfig, layout: LayoutSpec, gpu: Gpu, tp: int, shares: Shares | None = None
) -> dict[str, Any]:
    """Every coefficient by name, for `dsv4._core.StepModel`.

    Tensor parallelism divides weights, history, window rows of a decode step and all arithmetic: each GPU works on its rows of the
    past for tokens that are on all of them, and on its tokens of a prompt.
    """
    s = shares or Shares()
    copy = gpu.copy_bytes_per_s / 1e6
    fp8, bf16 = gpu.weight_flops / 1e6, gpu.bf16_flops / 1e6
    dense, experts, flops = _linear(config, Parallel(tp=tp))
    part = {c.name: c for c in layout.components}
    _check_known(config, part)
    row_flops = 4 * config.num_heads * config.head_dim / tp / (bf16 * s.attention)
    index_flops = 2 * config.index_heads * config.index_head_dim / tp / (fp8 * s.index)
    indexed = [spec for spec in config.layers if spec.indexed]
    # Of each layer, per token of context: every layer scans what it reads, whoever stores it.
    scans, scores = 0.0, 0.0
    for spec in config.layers:
        if spec.indexed:
            scans += part[spec.index].row_bytes / spec.ratio / tp / (copy * s.index_read)
            scores += index_flops / spec.ratio
        elif spec.ratio:
            scans += part[spec.history].row_bytes / spec.ratio / tp / (copy * s.row_read)
            scores += row_flops / spec.ratio
    # a layer adds up twice and exchanges parts of attention; the indexer its candidates
    collectives = 3 * config.num_layers + len(indexed) if tp > 1 else 0
    # a prompt's token: an all-reduce's worth around the experts; its row and what its compressors take in are gathered, at half
    # the cost
    inputs = 4 * sum(
        2 * (1 + spec.overlap) * (config.head_dim + spec.indexed * config.index_head_dim)
        for spec in config.layers
        if spec.stores
    )
    exchanged = config.num_layers * (2 * config.hidden_size + config.head_dim) + inputs / 2
    window = part["window"]
    return {
        "overhead_us": config.num_layers * s.kernels_per_layer * s.kernel_us,
        "collective_us": collectives * s.collective_us,
        "collective_token_us": exchanged / s.collective_bytes_per_s * 1e6 if tp > 1 else 0,
        "copy_us": s.copy_launch_us + 2 * layout.snapshot_bytes / tp / copy,
        "dense_read_us": dense / (copy * s.weight_read),
        "expert_read_us": experts / (copy * s.weight_read),
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "token_us": flops / (fp8 * s.linear),
        "row_read_us": len(window.layers) * window.row_bytes * window.tokens / tp / (copy * s.row_read),
        "context_read_us": scans,
        "entry_read_us": sum(part[spec.history].row_bytes for spec in indexed) / tp / (copy * s.row_read),
        "query_us": config.num_layers * config.window * row_flops,
        "context_us": scores,
        "entry_us": len(indexed) * row_flops,
        "topk": config.index_topk if indexed else 0,
        "indexed": [
            {"ratio": ratio, "share": count / len(indexed)}
            for ratio, count in sorted(Counter(spec.ratio for spec in indexed).items())
        ],
    }


def _check_known(config: ModelConfig, part: Mapping[str, Component]) -> None:
    """Raises ConfigError for a component whose reading would cost nothing here."""
    known = {"window"}
    for spec in config.layers:
        known |= {spec.history, spec.pool, spec.index, spec.index_pool} if spec.ratio else set()
    unknown = next((name for name in part if name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"the step model does not know component {unknown!r} of the layout; {config.name} has {', '.join(sorted(known))}"
        )


def _linear(config: ModelConfig, parallel: Parallel) -> tuple[float, float, float]:
    """(bytes of a GPU's weights besides routed experts, of routed experts, flops of a token on it)."""
    rows = weight_rows(Weights.released(config), parallel, held="released")
    experts = sum(row.rank for row in rows if row.group == EXPERTS)
    # A step reads the head and not the embedding, which has the same size.
    read = {"embedding and head": 0.5}
    dense = sum(
        row.rank * read.get(row.group, 1) for row in rows if row.group != EXPERTS and row.dtype != "i64"
    )
    flops = 0.0
    for kind, count in Weights.released(config).kinds.items():
        if kind.group == "embedding and head" or kind.spec.storage == "i64" or len(kind.spec.shape) != 2:
            continue
        taken = config.experts_per_token / config.num_experts if kind.expert else 1
        flops += 2 * prod(kind.on_rank(parallel).shape) * count * taken
    return dense, experts, flops


def parse_overrides(text: str) -> tuple[Shares, dict[str, float]]:
    """'linear=0.3,overhead_us=900' -> (shares, coefficients to replace). Raises ConfigError."""
    known = {f.name: f for f in dataclasses.fields(Shares)}
    shares: dict[str, float] = {}
    coefficients: dict[str, float] = {}
    for item in filter(None, (x.strip() for x in text.split(","))):
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"step model {item!r}; write name=number, such as linear=0.3") from None
        if name in known:
            if not number > 0:
                raise ConfigError(f"step model: {name} is {value}; it must be above 0")
            shares[name] = number
        elif name in COEFFICIENTS:
            coefficients[name] = number
        else:
            names = [*known, *COEFFICIENTS]
            raise ConfigError(f"step model has no {name!r}; known: {', '.join(names)}{nearest(name, names)}")
    return Shares(**shares), coefficients


COEFFICIENTS = (
    "overhead_us",
    "collective_us",
    "collective_token_us",
    "copy_us",
    "dense_read_us",
    "expert_read_us",
    "token_us",
    "row_read_us",
    "context_read_us",
    "entry_read_us",
    "query_us",
    "context_us",
    "entry_us",
)
"""Coefficients that may be given directly."""
READS = ("dense_read_us", "expert_read_us", "row_read_us", "context_read_us", "entry_read_us")
ARITHMETIC = ("token_us", "query_us", "context_us", "entry_us")
