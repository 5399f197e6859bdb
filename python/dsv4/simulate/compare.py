"""One trace under several policies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.config import check_choice, evictions, snapshot_policies
from dsv4.errors import ConfigError
from dsv4.gpus import Gpu
from dsv4.model.config import ModelConfig
from dsv4.model.layout import over_ranks
from dsv4.model.parallel import Parallel, valid_tp
from dsv4.plan.weights import Weights, weight_rows
from dsv4.plan.workspace import Limits, bound, workspace
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec, Trace

STEPS_BETWEEN_CALLS = 2000
"""Steps of the core between two looks at the progress: some tens of milliseconds."""
MOST_WEIGHTS = 0.75
"""Largest share of a GPU's memory that weights take where the number of GPUs is chosen here."""

Watch = Callable[[str, int, int, float], None]
"""Called with policy, requests over, requests in all, virtual seconds."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A snapshot policy and an eviction order, written `auto/value`."""

    snapshots: str
    eviction: str

    @classmethod
    def parse(cls, text: str, eviction: str) -> Policy:
        """`NAME` or `NAME/EVICTION`. Raises ConfigError."""
        name, slash, after = text.strip().partition("/")
        if not name or (slash and not after):
            raise ConfigError(f"policy is {text!r}; write NAME or NAME/EVICTION, such as auto/value")
        check_choice("snapshot_policy", name, name, snapshot_policies())
        if slash and after not in evictions():
            orders = ", ".join(evictions())
            raise ConfigError(
                f"policy is {text!r}; its eviction order is one of {orders}{nearest(after, evictions())}"
            )
        return cls(name, after or eviction)

    def __str__(self) -> str:
        return f"{self.snapshots}/{self.eviction}"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: `tp` GPUs, of which each holds its rows of every page."""

    config: ModelConfig
    layout: LayoutSpec
    gpu: Gpu
    tp: int
    pages: int
    max_num_seqs: int
    max_step_tokens: int
    max_waiting: int
    step_budget: Any
    """The core's (`config.step_budget`)."""
    snapshot_budget: float | None
    weights: Mapping[str, float]
    """Shares of tenants by name; others have 1."""
    coefficients: Mapping[str, Any]
    """Of the step model, from which the scheduler's costs follow too."""
    sequential: bool
    """One request at a time, and no time passes."""

    @property
    def pool_bytes(self) -> int:
        """On each GPU."""
        return self.pages * over_ranks(self.layout, self.tp).page_bytes

    @property
    def max_len(self) -> int:
        """Longest request: the model's limit, or what the pool holds."""
        return min(self.config.max_position, self.pages * self.layout.block_tokens)


def smallest_tp(config: ModelConfig, gpu: Gpu) -> int:
    """The fewest GPUs on which weights leave room for a pool. Raises ConfigError."""
    ways = valid_tp(config)
    for tp in ways:
        if _weights(config, tp) <= MOST_WEIGHTS * gpu.memory_bytes:
            return tp
    need = _weights(config, ways[-1]) / 1e9
    raise ConfigError(
        f"gpu is {gpu.name!r}; {config.name} needs {need:,.0f} GB of weights on each of {ways[-1]} of them"
    )


def pool_bytes(
    config: ModelConfig, layout: LayoutSpec, gpu: Gpu, tp: int, limits: Limits, fraction: float
) -> int:
    """What `fraction` of a GPU's memory leaves for pages, by the planner's figures. Raises ConfigError."""
    weights = _weights(config, tp)
    rest = limits.running * layout.slab_bytes + bound(workspace(config, layout, Parallel(tp=tp), limits))
    left = int(gpu.memory_bytes * fraction) - weights - rest
    if left < over_ranks(layout, tp).page_bytes:
        raise ConfigError(
            f"tp is {tp}; {config.name} on {gpu.name} needs {weights / 1e9:,.1f} GB of weights and {rest / 1e9:,.1f} GB "
            f"of state and workspace on each GPU, of {gpu.memory_bytes * fraction / 1e9:,.1f} GB; give a larger --tp"
        )
    return left


def _weights(config: ModelConfig, tp: int) -> int:
    return sum(row.rank for row in weight_rows(Weights.released(config), Parallel(tp=tp), held="released"))


def compare(
    trace: Trace, engine: Engine, policies: Sequence[Policy], watch: Watch
) -> dict[str, dict[str, Any]]:
    """The core's report of each policy, by name. Raises ConfigError for a policy that the core does not know."""
    replays = {str(p): _replay(trace, engine, p) for p in policies}
    return {name: _finish(name, replays.pop(name), watch) for name in list(replays)}


def resume(dump: str, engine: Engine, watch: Watch) -> dict[str, dict[str, Any]]:
    """The report of a dump's live requests, run to their end under the dump's own options. Raises ConfigError."""
    from dsv4._core import Replay, StepModel

    model = StepModel(engine.coefficients)
    return {"dump": _finish("dump", Replay.resume(dump, engine.layout, model), watch)}


def _finish(name: str, replay: Any, watch: Watch) -> dict[str, Any]:
    done, total = -1, 0
    while done < total:
        done, total, seconds, _ = replay.run(STEPS_BETWEEN_CALLS)
        watch(name, done, total, seconds)
    report: dict[str, Any] = json.loads(replay.report())
    return report


def _replay(trace: Trace, engine: Engine, policy: Policy) -> Any:
    from dsv4._core import Replay, StepModel

    unknown = set(engine.weights) - set(trace.tenants)
    if unknown:
        raise ConfigError(f"tenant {min(unknown)!r} is not in the trace; it has {', '.join(trace.tenants)}")
    ids = {name: i for i, name in enumerate(trace.tenants)}
    options = {
        "pages": engine.pages,
        "slabs": engine.max_num_seqs,
        "max_step_tokens": max(engine.max_step_tokens, trace.longest_prompt)
        if engine.sequential
        else engine.max_step_tokens,
        "max_len": engine.max_len,
        "max_waiting": engine.max_waiting,
        "snapshots": policy.snapshots,
        "eviction": policy.eviction,
        "step_budget": engine.step_budget,
        "tenants": [{"id": ids[name], "weight": weight} for name, weight in engine.weights.items()],
    }
    if engine.snapshot_budget is not None:
        options["snapshot_budget"] = engine.snapshot_budget
    model = StepModel(engine.coefficients)
    return Replay(trace, engine.layout, options, model=model, sequential=engine.sequential)
