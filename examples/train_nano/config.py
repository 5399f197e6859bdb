"""The model's shape and the run's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 6272,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 2,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 64,
    "sliding_window": 128,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 32768,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}
"""config.json of the model that ships. The last ratio is the MTP block's."""


@dataclass(slots=True)
class Run:
    """Numbers of a training run. Shares are of the time that is left for training."""

    rows: int = 8
    length: int = 4096
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warm_up_steps: int = 100
    flat: float = 0.4
    lowest: float = 0.02
    dense: float = 0.25
    """Attention sees every entry that long, then the indexer's choice alone."""
    far_from: float = 0.5
    """From here on half of the steps have gaps in their positions, up to `farthest`."""
    farthest: int = 32768
    draft_rows: int = 2
    """Rows of a batch on which the MTP block is trained."""
    bias_rate: float = 0.002
    workers: int = 12
    evaluation_seconds: float = 55.0
    checkpoint_seconds: float = 45.0
    own: int = 0
    """Pieces that the model writes every `own_seconds`, of which what loops is unlearnt (own.py)."""
    own_seconds: float = 50.0

    @classmethod
    def second(cls) -> Run:
        """From a model that is trained: its own loops are unlearnt, at rates that start low."""
        return cls(
            muon_rate=0.006, adam_rate=1e-3, warm_up_steps=50, flat=0.0, dense=0.0, far_from=0.0, own=128
        )

    @classmethod
    def smoke(cls) -> Run:
        """Seconds on a CPU."""
        return cls(rows=2, length=512, warm_up_steps=2, draft_rows=1, workers=1, evaluation_seconds=60)
