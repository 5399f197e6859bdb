"""`/health` while clients attack the server slowly, all processes on their own (`benches/slow_clients.py`)."""

from __future__ import annotations

from benches.slow_clients import KINDS, measured

EACH = 50


def test_a_probe_is_answered_within_100_ms() -> None:
    """Of CPU, which neighbours do not disturb: no turn of the event loop is as long, so a probe waits for none. By the clock where the
    machine gave the server a core whenever it could run."""
    told = measured(EACH, seconds=3, nice=19)
    assert told["failed"] == [] and told["probes"] >= 10
    assert min(told["opened"].values()) >= EACH and told["connections"] > EACH * (len(KINDS) - 2)
    assert told["turn_cpu_ms"]["turns"] > 50 and told["turn_cpu_ms"]["1"] < 100, told
    if told["server_waited_for_a_core"] < 0.05:
        assert told["health_ms"]["0.95"] < 100, told
    assert told["after"] == told["before"]
