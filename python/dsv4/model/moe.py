"""Mixture of experts of one layer."""

from __future__ import annotations

from torch import Tensor

from dsv4.model.config import ModelConfig
from dsv4.model.scope import Scope
from dsv4.ops.registry import Ops


class MoE:
    """Routed experts plus one shared expert. The first layers route by a table of token ids, the others by
    scores."""

    def __init__(self, weights: Scope, config: ModelConfig, layer: int, ops: Ops) -> None:
        self.ops, self.limit = ops, config.swiglu_limit
        self.k, self.scale = config.experts_per_token, config.routed_scaling_factor
        self.gate = weights.float("gate.weight")
        hashed = layer < config.num_hash_layers
        self.table = weights["gate.tid2eid"].sort(-1).values if hashed else None
        self.bias = None if hashed else weights.float("gate.bias")
        self.experts = tuple(weights[f"experts.{name}"] for name in ("w1", "w3", "w2"))
        self.shared = tuple(weights[f"shared_experts.{name}.weight"] for name in ("w1", "w3", "w2"))

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[T, d] -> [T, d]; token_ids int64 [T]."""
        chosen = None if self.table is None else self.table[token_ids]
        experts, weights = self.ops.route(x.float(), self.gate, self.bias, chosen, self.k, self.scale)
        routed = self.ops.experts(x, experts, weights, *self.experts, self.limit)
        return (routed + self.ops.swiglu(x, *self.shared, self.limit).float()).to(x.dtype)
