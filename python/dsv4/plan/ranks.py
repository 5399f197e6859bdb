"""How many ranks a model takes on given GPUs: the least whose plan holds one request."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dsv4.config import EngineConfig, default_step_tokens
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import Parallel, valid_tp
from dsv4.plan.build import divide
from dsv4.plan.weights import Weights
from dsv4.plan.workspace import Limits

TRIED = (1, 2, 4, 8)
"""Ranks that are taken by themselves."""


def least_ranks(valid: Collection[int], most: int, fits: Callable[[int], bool]) -> int:
    """The least of TRIED that fits on `most` GPUs, or the most there is: what is missing is said of that."""
    possible = [n for n in TRIED if n in valid and n <= most] or [1]
    return next((n for n in possible if fits(n)), possible[-1])


def planned(
    config: ModelConfig, weights: Weights, memory: int, num: int, max_len: int | None = None
) -> tuple[int, int, bool]:
    """(ranks, tokens that they hold, whether that is a request of `max_len`) on up to `num` GPUs of `memory` bytes each, with the
    default settings and the trained formats, as `dsv4 plan` has them."""
    defaults, wanted = EngineConfig(), max_len or config.max_position
    running, share = defaults.max_num_seqs, int(memory * defaults.gpu_memory_utilization)

    def tokens(ranks: int) -> int:
        limits = Limits(default_step_tokens("cuda", running, ranks), running, wanted, graphs=None)
        layout = config.layout("fp8_ds_mla", "mxfp4", ranks=ranks)
        memory_plan = divide(config, weights, layout, Parallel(tp=ranks), limits, share, held="released")
        return memory_plan.pages * layout.block_tokens

    ranks = least_ranks(valid_tp(config), num, lambda n: tokens(n) >= wanted)
    held = tokens(ranks)
    return ranks, held, held >= wanted
