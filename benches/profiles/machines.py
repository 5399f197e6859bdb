"""Machines, and the traffic that keeps each of them busy without overloading it."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from typing import Any

from dsv4._core import Trace
from dsv4.config import settle
from dsv4.gpus import gpu
from dsv4.plan.weights import find_weights
from dsv4.simulate.agents import Agents
from dsv4.simulate.compare import Policy, compare
from dsv4.simulate.engine import Engine, StepTimes, build
from dsv4.simulate.records import LogNormal, write
from dsv4.simulate.traffic import Chat, Documents, Rollouts, Spec, generate, mixed

SEED, HOURS = 1, 0.25


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine over all GPUs of a host, and how many sessions of each shape it is given."""

    name: str
    model: str
    gpu: str
    gpus: int
    sessions: dict[str, int]
    batch_s: float
    """Between two batches of rollouts."""
    step_model: str | None = None
    """Shares that the step model takes in place of those it assumes."""


HGX = Machine(
    "HGX B200, V4-Pro", "v4-pro", "b200", 8,
    {"chat": 3100, "coding-agent": 160, "long-agent": 60, "rollout": 96, "long-document": 120, "mixed": 400}, 400.0,
)  # fmt: skip
H200X2 = Machine(
    "2 x H200, V4-Flash", "v4-flash", "h200", 2,
    {"chat": 2700, "coding-agent": 130, "long-agent": 50, "rollout": 96, "long-document": 75, "mixed": 300}, 600.0,
)  # fmt: skip
H200X8 = Machine(
    "8 x H200, V4-Pro", "v4-pro", "h200", 8,
    {"chat": 2000, "coding-agent": 120, "long-agent": 40, "rollout": 96, "long-document": 70, "mixed": 300}, 500.0,
)  # fmt: skip
B200 = Machine(
    "one B200, V4-Flash", "v4-flash", "b200", 1,
    {"chat": 2400, "coding-agent": 80, "long-agent": 16, "rollout": 96, "long-document": 50, "mixed": 200}, 500.0,
)  # fmt: skip
MACHINES = (HGX, H200X2)
SLOWER = Machine(
    "2 x H200, V4-Flash, arithmetic at half the assumed rate", "v4-flash", "h200", 2,
    {"chat": 1500, "coding-agent": 70, "long-agent": 27, "rollout": 96, "long-document": 66, "mixed": 165}, 700.0,
    "linear=0.22,index=0.25,attention=0.3",
)  # fmt: skip
MORE = (H200X8, B200, SLOWER)
"""Of which only each traffic's own profile and `mixed` are run."""


def traffic(machine: Machine) -> dict[str, Spec]:
    """A trace for each profile, by its name. Sessions begin within HOURS, and end when they are done."""
    n = machine.sessions
    both = mixed(n["mixed"], HOURS, 0.3)
    agents = Agents(hours=HOURS, rewritten=0.3, calls=LogNormal(20, 30, 120))
    return {
        "chat": Chat(sessions=n["chat"], hours=HOURS),
        "coding-agent": replace(agents, sessions=n["coding-agent"], long_window=0.0),
        "long-agent": replace(
            agents, sessions=n["long-agent"], long_window=1.0, projects=8, calls=LogNormal(20, 30, 90),
            tool_result=LogNormal(2_500, 9_000, 120_000),
        ),
        "rollout": Rollouts(sessions=n["rollout"], every_s=machine.batch_s),
        "long-document": Documents(sessions=n["long-document"], hours=HOURS),
        "mixed": replace(both, agents=replace(agents, sessions=both.agents.sessions)),
    }  # fmt: skip


@functools.cache
def trace_of(spec: Spec) -> Trace:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        write(generate(spec, SEED), file.file)
        file.flush()
        return Trace.read([file.name])


def engine_of(machine: Machine, **settings: Any) -> Engine:
    """Over all GPUs of a machine. Raises ConfigError."""
    config, _, _ = find_weights(machine.model)
    made = settle({"tensor_parallel_size": machine.gpus, **settings}, {})
    return build(config, gpu(machine.gpu), made, StepTimes(step_model=machine.step_model))[0]


def run(spec: Spec, engine: Engine, policy: Policy | None = None) -> dict[str, Any]:
    """The core's report. `policy`: else that of the engine's settings."""
    policy = policy or Policy(engine.settings.snapshot_policy, engine.settings.eviction)
    [report] = compare(trace_of(spec), engine, [policy], lambda *_: None).values()
    return report
