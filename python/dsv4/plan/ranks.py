"""How many ranks a model takes on given GPUs: the least whose plan holds one request."""

from __future__ import annotations

from dsv4.config import EngineConfig, default_step_tokens
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import Parallel, valid_tp
from dsv4.plan.build import divide
from dsv4.plan.graphs import steps_of
from dsv4.plan.weights import Weights
from dsv4.plan.workspace import Limits

TRIED = (1, 2, 4, 8)


def least(
    config: ModelConfig, weights: Weights, memory: int, num: int, max_len: int | None = None
) -> tuple[int | None, int]:
    """(ranks, tokens that fit) on up to `num` GPUs of `memory` bytes each, with the default settings and the trained formats, as
    `dsv4 plan` has them; None where none of TRIED does, and then the tokens of the largest number of ranks."""
    defaults, tokens, wanted = EngineConfig(), 0, max_len or config.max_position
    running, share = defaults.max_num_seqs, int(memory * defaults.gpu_memory_utilization)
    step = default_step_tokens("cuda", running)
    limits = Limits(step, running, wanted, steps_of(running, wanted, step))
    for ranks in TRIED:
        if ranks > num or ranks not in valid_tp(config):
            continue
        layout = config.layout("fp8_ds_mla", "mxfp4", ranks=ranks)
        memory_plan = divide(config, weights, layout, Parallel(tp=ranks), limits, share, held="released")
        tokens = memory_plan.pages * layout.block_tokens
        if tokens >= wanted:
            return ranks, tokens
    return None, tokens
