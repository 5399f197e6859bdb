"""One trace under several policies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.config import evictions, snapshot_policies
from dsv4.errors import ConfigError
from dsv4.settings import check_choice
from dsv4.simulate.engine import Engine
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4._core import Trace

STEPS_BETWEEN_CALLS = 2000
"""Steps of the core between two looks at the progress: some tens of milliseconds."""
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
    options = engine.core_options(trace.longest_prompt) | {
        "snapshots": policy.snapshots,
        "eviction": policy.eviction,
        "tenants": [{"id": ids[name], "weight": weight} for name, weight in engine.weights.items()],
    }
    model = StepModel(engine.coefficients)
    return Replay(trace, engine.layout, options, model=model, sequential=engine.sequential)
