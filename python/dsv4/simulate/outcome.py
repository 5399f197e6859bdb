"""What a profile makes of a workload: the figures by which profiles are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dsv4.config import settle
from dsv4.simulate.compare import Policy, Watch, compare
from dsv4.simulate.engine import StepTimes, build

if TYPE_CHECKING:
    from dsv4._core import Trace
    from dsv4.gpus import Gpu
    from dsv4.model.config import ModelConfig
    from dsv4.simulate.engine import Engine


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times are seconds."""

    profile: str
    capacity: int
    """Tokens of history that the pool holds."""
    hit_rate: float
    ttft: Mapping[str, float]
    """`p50`, `p90`, `p99`."""
    itl: Mapping[str, float]
    answer: float
    """From arrival to the last token, in the mean."""
    output_rate: float
    """Tokens a second of the whole run."""
    busy: float
    """Share of the run in which the GPUs were in a step."""
    gpu_hours: float
    """Of steps, for a million output tokens."""
    refused: int
    waiting: float
    """Requests that wait, in the mean over the run."""

    @classmethod
    def of(cls, profile: str, engine: Engine, report: Mapping[str, Any]) -> Outcome:
        """From the core's report."""
        ttft, itl, output = report["ttft_ms"], report["itl_ms"], report["tokens"]["output"]
        decoding = itl["mean"] * itl["count"] / max(ttft["count"], 1)
        return cls(
            profile,
            engine.pages * engine.layout.block_tokens,
            report["hits"]["cached"],
            {q: ttft[q] / 1000 for q in ("p50", "p90", "p99")},
            {q: itl[q] / 1000 for q in ("p50", "p90", "p99")},
            (ttft["mean"] + decoding) / 1000,
            report["output_tokens_per_s"],
            report["busy_s"] / max(report["virtual_s"], 1e-9),
            report["busy_s"] * engine.tp / 3600 / max(output, 1) * 1e6,
            report["refused"],
            fmean(report["timeline"]["waiting"] or [0]),
        )

    def as_json(self) -> dict[str, Any]:
        """Under the fields' names."""
        return json.loads(json.dumps({name: getattr(self, name) for name in self.__slots__}))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engines of all profiles run on, and what comes before their settings."""

    model: ModelConfig
    gpu: Gpu
    times: StepTimes
    flags: Mapping[str, Any]
    """Settings that come before those of profiles."""
    pool: int | None = None
    """Bytes on each GPU, in place of what is left."""

    def engine(self, profile: str) -> tuple[Engine, str]:
        """With a profile's settings, and where its step times come from. Raises ConfigError."""
        settings = settle({**self.flags, "profile": profile}, {})
        return build(self.model, self.gpu, settings, self.times, pool=self.pool)


def outcomes(trace: Trace, machine: Machine, profiles: Sequence[str], watch: Watch) -> list[Outcome]:
    """One for each profile, in their order. Raises ConfigError."""
    found = []
    for name in profiles:
        engine, _ = machine.engine(name)
        policy = Policy(engine.settings.snapshot_policy, engine.settings.eviction)
        [report] = compare(trace, engine, [policy], _named(name, watch)).values()
        found.append(Outcome.of(name, engine, report))
    return found


def _named(profile: str, watch: Watch) -> Watch:
    """Which is told the profile, not the policy."""

    def tell(_: str, done: int, total: int, seconds: float) -> None:
        watch(profile, done, total, seconds)

    return tell
