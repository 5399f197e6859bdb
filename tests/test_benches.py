"""Benchmarks of the host in a small world: what they drive changes, and nothing else would say that they do not run any more."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

pytest.importorskip("dsv4._core")
pytest.importorskip("triton")

import benches
from benches import event_cost, prompt_path

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(benches.__path__, "benches.") if "__main__" not in m.name
)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_benchmark_takes_is_there(name: str) -> None:
    """Most of them need a GPU, or hours."""
    import_module(name)


def test_every_stage_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    prompt_path.main(["--small", "--messages", "4", "--tokens", "4000", "--rounds", "1"])
    said = capsys.readouterr().out
    assert said.startswith("5 messages") and said.count("scan and parse the body") == 2
    for stage in ("check ids", "submission", "first plan"):
        assert stage in said


def test_steps_with_events_beside_steps_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert event_cost.main(["--rows", "4", "--steps", "250", "--rounds", "1", "--step-ms", "0.1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 rows, ") and not said.startswith("4 rows, 0 messages") and "more: " in said
