"""Small random V4 models: config, weights with every parameter randomised, and the same model in
`transformers`.

The initialisation that `transformers` gives (ape and sinks zero, tid2eid zero, norms one) hides bugs, so
nothing keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.model.config import ModelConfig
from dsv4.model.names import tensors, transformers_name
from torch import Tensor, nn

SCHEDULES = {
    "flash": [0, 0, 4, 128, 4, 128],
    "pro": [128, 128, 4, 128, 4],
}
"""Compression ratios per layer as in the two releases: window only or HCA first, then CSA and HCA in turn."""

_BASE: dict[str, Any] = dict(
    model_type="deepseek_v4",
    architectures=["DeepseekV4ForCausalLM"],
    vocab_size=256,
    hidden_size=128,
    moe_intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    num_hash_layers=1,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    index_n_heads=4,
    index_head_dim=64,
    index_topk=512,
    sliding_window=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=dict(
        type="yarn", factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1
    ),
    max_position_embeddings=65536,
    scoring_func="sqrtsoftplus",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def random_config_dict(kind: str = "flash", **overrides: object) -> dict[str, Any]:
    """A released-style config.json of a small model; `kind` is a key of SCHEDULES, overrides are config.json
    keys."""
    config = {**_BASE, "compress_ratios": SCHEDULES[kind], **overrides}
    config["num_hidden_layers"] = len(config["compress_ratios"])
    return config


def random_config(kind: str = "flash", **overrides: object) -> ModelConfig:
    """The same as a ModelConfig."""
    return ModelConfig.from_dict(random_config_dict(kind, **overrides))


def weight_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor as the loader gives them: in released names, the experts of a layer stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in tensors(c):
        stack, _, expert = name.partition(".ffn.experts.")
        if expert:
            shapes[f"{stack}.ffn.experts.{expert.split('.')[1]}"] = (c.num_experts, *spec.shape)
        else:
            shapes[name] = spec.shape
    return shapes


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights in canonical names: norms 1 +- 0.1; sinks, ape, hc base and gate bias of width 0.5; matrices of
    width 1.5 / sqrt(fan in); hash tables of random distinct experts. What the release keeps in float32 stays
    so."""
    g = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        if name.endswith(".tid2eid"):
            order = torch.rand(config.vocab_size, config.num_experts, generator=g).argsort(-1)
            weights[name] = order[:, : config.experts_per_token].contiguous()
            continue
        x = torch.randn(shape, generator=g)
        if name.endswith("norm.weight"):
            x = 1 + 0.1 * x
        elif name.endswith("_scale"):
            x = 0.5 + 0.1 * x
        elif name.endswith(("attn_sink", "ape", "_base", "gate.bias")):
            x = 0.5 * x
        else:
            x = 1.5 * x / shape[-1] ** 0.5
        plain = "hc_" in name or name.endswith(("attn_sink", "ape", "gate.bias"))
        weights[name] = x if plain else x.to(dtype)
    return weights


def hf_state_dict(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical weights under the names of `transformers`."""
    state = {transformers_name(n): w for n, w in weights.items() if ".experts." not in n}
    for layer in range(config.num_layers):
        w1, w3, w2 = (weights[f"layers.{layer}.ffn.experts.{n}"] for n in ("w1", "w3", "w2"))
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return state


def hf_twin(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    """`transformers.DeepseekV4ForCausalLM` in float32 with the same weights, in eval mode."""
    pytest.importorskip("transformers")  # `make test-lowest` runs without it
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    c, yarn = config, config.yarn
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=c.rope_theta)
    if yarn is not None:
        rope |= dict(
            rope_type="yarn",
            factor=yarn.factor,
            original_max_position_embeddings=yarn.original_max_position,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
        )
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            moe_intermediate_size=c.moe_intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            head_dim=c.head_dim,
            q_lora_rank=c.q_lora_rank,
            o_groups=c.o_groups,
            o_lora_rank=c.o_lora_rank,
            n_routed_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token,
            routed_scaling_factor=c.routed_scaling_factor,
            swiglu_limit=c.swiglu_limit,
            hc_mult=c.hc_mult,
            hc_sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            index_n_heads=c.index_heads,
            index_head_dim=c.index_head_dim,
            index_topk=c.index_topk,
            sliding_window=c.window,
            num_hash_layers=c.num_hash_layers,
            qk_rope_head_dim=c.rope_dim,
            compress_ratios=list(c.compress_ratios),
            rope_theta=c.rope_theta,
            compress_rope_theta=c.compress_rope_theta,
            rms_norm_eps=c.rms_eps,
            max_position_embeddings=c.max_position,
            rope_parameters=rope,
        )
    ).eval()
    state = hf_state_dict(config, weights)
    model.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in state.items()})
    return model
