"""`--record-steps`: a file that is no good is refused at start, and one that becomes so costs the record and no step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.engine.steps import StepRecord
from dsv4.errors import ConfigError
from dsv4.simulate.calibrate import read_steps

from tests.support.engines import write_tiny

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def recording(model: Path, path: str) -> LLM:
    return LLM(str(model), num_pages=20, max_num_seqs=2, block_size=128, device="cpu", record_steps=path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "no more steps are recorded" in r.getMessage()]


def test_a_full_disk_costs_the_record_and_no_step(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = recording(model, "/dev/full")
    for _ in range(2):
        assert len(llm.generate([[5, 6, 7]], PARAMS)[0].token_ids) == 5
    assert len(told(caplog)) == 1 and "/dev/full: " in told(caplog)[0] and "No space left" in told(caplog)[0]


def test_a_directory_that_goes_away(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "records"
    place.mkdir()
    llm = recording(model, str(place / "steps.jsonl"))
    llm.generate([[5, 6, 7]], PARAMS)
    assert len(read_steps(str(place / "steps.jsonl"))) == 5 and not told(caplog)
    shutil.rmtree(place)
    assert len(llm.generate([[5, 6, 7]], PARAMS)[0].token_ids) == 5
    assert len(told(caplog)) == 1
    place.mkdir()
    llm.generate([[5, 6, 7]], PARAMS)
    assert not list(place.iterdir()), "it stays off: a record with a hole would mislead"


@pytest.mark.parametrize("bad", ["", "no/such/directory/steps", ".", "pipe", "file/steps", "\0"])
def test_a_path_that_cannot_be_written_is_refused(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("file").touch()
    with pytest.raises(ConfigError, match="record_steps is '") as e:
        StepRecord(bad)
    assert "\n" not in str(e.value)


def test_it_is_refused_before_weights_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.engine.build.load_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="record_steps"):
        recording(model, "/nowhere/steps")
