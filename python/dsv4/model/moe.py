"""Mixture of experts of one layer."""

from __future__ import annotations

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
        """[T, d] -> [T, d]; `shared`: x for the shared expert."""
        return self.mixed(x, shared, step.token_ids)

    def mixed(self, x: Tensor, shared: Tensor | Quantised, token_ids: Tensor) -> Tensor:
        """The same for token ids int64 [T]."""
        chosen = None if self.table is None else self.table[token_ids]
        # The shared expert is the longer chain: it stays on the stream where each launch begins before the last one is over.
        routed = beside(lambda: self.ops.route(x, self.gate, self.bias, chosen, self.k, self.scale), 0)
        always = self.ops.swiglu(shared, self.shared, self.limit)
        experts, weights = routed()
        return self.ops.experts(x, experts, weights, self.experts, self.limit, always)
