"""Mixture of experts of one layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsv4.model.beside import beside
from dsv4.model.config import ModelConfig
from dsv4.model.scope import Scope
from dsv4.model.step import Step
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops


class MoE:
    """Routed experts plus one shared expert. The first layers route by a table of token ids, the others by
    scores."""

    def __init__(self, weights: Scope, config: ModelConfig, layer: int, ops: Ops) -> None:
        self.ops, self.limit = ops, config.swiglu_limit
        self.k, self.scale = config.experts_per_token, config.routed_scaling_factor
        self.gate = weights.matrix("route", "gate.weight")
        hashed = layer < config.num_hash_layers
        self.table = weights["gate.tid2eid"].sort(-1).values if hashed else None
        self.bias = None if hashed else weights.float("gate.bias")
        self.experts = weights.gated("experts", "experts")
        self.shared = weights.gated("swiglu", "shared_experts", ".weight")

    def __call__(self, x: Tensor, shared: Tensor | Quantised, step: Step) -> Tensor:
        """[T, d] -> [T, d]; `shared`: x for all experts."""
        # The shared expert is the longer chain: it stays on the stream where each launch begins before the last one is over.
        return self.mixed(shared, beside(lambda: self.routed(x, step.token_ids), 0))

    def routed(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, k] and their weights float32 [T, k] of tokens with these ids int64 [T]."""
        chosen = None if self.table is None else self.table[token_ids]
        experts, weights = self.ops.route(x, self.gate, self.bias, chosen, self.k, self.scale)
        return experts, weights

    def mixed(self, x: Tensor | Quantised, routed: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """[T, d]: of all experts, the routed ones as `routed` gives them."""
        always = self.ops.swiglu(x, self.shared, self.limit)
        return self.ops.experts(x, *routed(), self.experts, self.limit, always)
