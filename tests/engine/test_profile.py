"""Profiles of one engine: each belongs to who began it."""

from __future__ import annotations

from pathlib import Path

import pytest
from dsv4.engine.profile import Profiling
from dsv4.errors import Dsv4Error


def test_two_profiles_do_not_mix(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    profiling = Profiling()
    profiling.begin(a, 1)
    with pytest.raises(Dsv4Error, match="is being taken"):
        profiling.begin(b, 5)
    assert profiling.end(b) == 0 and profiling.running, "what was refused ends no other"
    profiling.step()
    profiling.begin(b, 5)  # before the one who began `a` has looked again
    profiling.step()
    assert profiling.state(a) and not profiling.state(b)
    assert profiling.end(a) == 1 and profiling.running
    profiling.step()
    assert profiling.end(b) == 2 and not profiling.running
    assert all("traceEvents" in Path(file).read_text() for file in (a, b))
    assert profiling.end(a) == 0
    with pytest.raises(Dsv4Error, match="has ended"):
        profiling.state(a)
