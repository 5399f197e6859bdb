"""`dsv4 calibrate`: shapes, the fit and its judgement, the file, and the way from a small model to `dsv4 simulate`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from dsv4 import LLM
from dsv4._core import StepModel
from dsv4.engine.measuring import Measuring
from dsv4.errors import ConfigError
from dsv4.gpus import gpu
from dsv4.model.config import ModelConfig
from dsv4.simulate.calibrate import Measured, scaled
from dsv4.simulate.coefficients import Calibration, size_of
from dsv4.simulate.device import step_coefficients
from dsv4.simulate.fitting import fit, table
from dsv4.simulate.shapes import DECODES, Limits, designed, kind_of

from tests.support.engines import write_tiny

FLASH = ModelConfig.preset("v4-flash")
LAYOUT = FLASH.layout("fp8_ds_mla", "mxfp4")
FOUND = Calibration(
    "my copy",
    size_of(FLASH),
    "a device",
    "h200",
    "fp8_ds_mla",
    "mxfp4",
    8,
    800.0,
    1.5,
    2.5,
    3.0,
    100,
    0.05,
    0.1,
)


def test_shapes_fit_and_the_cheap_ones_come_first() -> None:
    small = Limits(rows=4, step_tokens=512, max_len=2048, pool_tokens=6000)
    shapes = designed(small)
    assert {s.batch for s in shapes} == {1, 2, 4} and max(s.context for s in shapes) == 1024
    assert all(s.batch * s.context + s.beside <= 6000 for s in shapes) and any(s.beside for s in shapes)
    costs = [s.batch * s.context + s.beside for s in shapes]
    assert costs == sorted(costs)
    assert max(s.context for s in designed(Limits(64, 4096, 2**20, 10**7))) == 262_144
    assert not designed(Limits(1, 512, 64, 512))


def test_kinds_of_steps() -> None:
    decodes = [(1500, 1), (1700, 1)]
    assert kind_of(Measured(1, decodes, 0)) == "2 decodes at 1K"
    assert kind_of(Measured(1, [(64, 9)], 0)) == "few prompt tokens at 64"
    assert kind_of(Measured(1, [(0, 512)], 1)) == "512 prompt tokens at 0, states copied"
    assert kind_of(Measured(1, [*decodes, (2048, 512)], 0)) == "2 decodes at 1K + 512 prompt tokens at 2K"


def made_up(true: dict[str, float]) -> list[Measured]:
    rows = [[(c + i, 1)] * b for c in (1000, 50_000) for b in (1, 8, 64) for i in range(18)]
    rows += [[(4096 * i, n)] for i in range(8) for n in (512, 4096)]
    steps = []
    for i, some in enumerate(rows):
        fixed, pairs = StepModel(true).parts(some, i % 3)
        steps.append(Measured(fixed + sum(max(p) for p in pairs), some, i % 3))
    return steps


def test_a_fit_finds_four_factors_and_is_judged_by_steps_held_back() -> None:
    start = step_coefficients(FLASH, LAYOUT, gpu("h200"), 1)
    steps = made_up(scaled(start, 3000.0, 1.4, 2.2, 5.0))
    odd = dataclasses.replace(steps[0], us=100 * steps[0].us)
    judged = fit(start, [*steps, odd])
    found = judged.fit
    assert (found.overhead_us, found.reads, found.arithmetic, found.copies) == pytest.approx(
        (3000, 1.4, 2.2, 5.0), rel=1e-6
    )
    assert judged.left_out == 1 and judged.p90_error < 1e-6
    assert found.steps + len(judged.held) == len(steps)
    assert not {id(s) for s in judged.held} & {id(odd)} and table(judged).row_count > 3
    # A model that is wrong shows in what was held back.
    warped = [dataclasses.replace(s, us=s.us * (1 + 0.5 * (i % 2))) for i, s in enumerate(steps)]
    assert fit(start, warped).median_error > 0.1


def test_too_few_steps_are_refused() -> None:
    start = step_coefficients(FLASH, LAYOUT, gpu("h200"), 1)
    with pytest.raises(ConfigError, match="5 steps were measured; a fit takes 20"):
        fit(start, made_up(start)[:5])


def test_fewer_layers_stand_for_all(tmp_path: Path) -> None:
    """The overhead by layers, everything else by the shapes of all layers and the factors."""
    plain = step_coefficients(FLASH, LAYOUT, gpu("h200"), 2)
    path = str(tmp_path / "c.json")
    FOUND.write(path)
    assert Calibration.read(path) == FOUND
    got = FOUND.coefficients(FLASH, LAYOUT, 2)
    assert got["overhead_us"] == pytest.approx(800 * FLASH.num_layers / 8)
    assert got["expert_read_us"] == pytest.approx(1.5 * plain["expert_read_us"])
    assert got["token_us"] == pytest.approx(2.5 * plain["token_us"])
    assert got["copy_us"] == pytest.approx(3 * plain["copy_us"])
    assert got["collective_us"] == plain["collective_us"] > 0
    assert "8 of 43 layers" in FOUND.about(FLASH, 2) and "collectives assumed" in FOUND.about(FLASH, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reads": "x"}, ["reads is 'x'", "number from 0"]),
        ({"layers": 0}, ["layers is 0", "whole number from 1"]),
        ({"roofline": "h10"}, ["roofline", "h10"]),
        ({"version": 9}, ["version is 9", "dsv4 calibrate"]),
        ({"reaches": [127] * 43}, ["unknown field 'reaches'", "dsv4 calibrate"]),
        ({"readz": 1}, ["unknown field 'readz'", "did you mean 'reads'"]),
        ({"steps": None}, ["has no steps", "dsv4 calibrate"]),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({k: v for k, v in (dataclasses.asdict(FOUND) | changes).items() if v is not None})
    )
    with pytest.raises(ConfigError) as e:
        Calibration.read(str(path))
    assert all(w in str(e.value) for w in (str(path), *words)) and "\n" not in str(e.value)


def test_another_model_or_format_is_refused() -> None:
    FOUND.check(FLASH, "fp8_ds_mla", "mxfp4")  # a directory may have another name than the release
    assert size_of(FLASH.first(8)) == size_of(FLASH) != size_of(ModelConfig.preset("v4-pro"))
    with pytest.raises(ConfigError, match=r"measured with .*the model is"):
        FOUND.check(ModelConfig.preset("v4-pro"), "fp8_ds_mla", "mxfp4")
    with pytest.raises(ConfigError, match="give --index-cache-dtype mxfp4"):
        FOUND.check(FLASH, "fp8_ds_mla", "fp8")


def test_an_engine_runs_the_shapes_and_warm_up_is_not_counted(tmp_path: Path) -> None:
    model, record = write_tiny(tmp_path / "tiny"), tmp_path / "steps.jsonl"
    llm = LLM(
        str(model), num_pages=40, max_num_seqs=2, max_model_len=1024, block_size=128, device="cpu",
        max_num_batched_tokens=128, record_steps=str(record),
    )  # fmt: skip
    measuring = Measuring(llm, record)
    measuring.warm_up()
    uncounted = len(record.read_text().splitlines())
    shapes = designed(measuring.limits)
    assert uncounted > 4 and {s.batch for s in shapes} == {1, 2}
    told: list[int] = []
    by_shape = list(measuring.run(600, lambda done, total, shape: told.append(done)))
    assert told == list(range(len(shapes))) and len(by_shape) == len(shapes)
    assert uncounted + sum(map(len, by_shape)) == len(record.read_text().splitlines())
    for shape, steps in zip(shapes, by_shape, strict=True):
        decodes = [s for s in steps if len(s.rows) == shape.batch and all(n == 1 for _, n in s.rows)]
        assert len(decodes) >= DECODES - 1, shape
        assert all(start >= shape.context for s in decodes for start, _ in s.rows)
        mixed = [s for s in steps if {n > 1 for _, n in s.rows} == {True, False}]
        assert mixed or not shape.beside, shape
    assert any(s.copies for steps in by_shape for s in steps)
    assert not llm.has_work()
    assert len(list(measuring.run(1e-9, lambda *_: None))) <= 1


def test_from_the_command_to_a_simulation(tmp_path: Path) -> None:
    def dsv4(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dsv4.cli", *words], capture_output=True, text=True)

    model, out = write_tiny(tmp_path / "tiny"), tmp_path / "c.json"
    small = ("--max-num-seqs", "2", "--max-model-len", "1024", "--num-pages", "20", "--device", "cpu")
    run = dsv4("calibrate", str(model), "-o", str(out), "--seconds", "20", *small)
    assert run.returncode == 0, run.stderr
    assert "predicted, ms" in run.stdout and "held back" in run.stderr and "shape 1 of" in run.stderr
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}\n')
    formats = ("--kv-cache-dtype", "float32", "--index-cache-dtype", "float32")
    words = ("simulate", str(trace), "--model", str(model), "--tp", "1", "--pool-gib", "0.1", "--json")
    run = dsv4(*words, "--coefficients", str(out), *formats)
    assert run.returncode == 0, run.stderr
    assert "measured on cpu" in run.stderr
    overhead = json.loads(out.read_text())["overhead_us"]
    assert json.loads(run.stdout)["step_model"]["overhead_us"] == pytest.approx(overhead)
    run = dsv4(*words, "--coefficients", str(out))
    assert run.returncode == 2 and "give --kv-cache-dtype float32" in run.stderr
    run = dsv4(*words, "--coefficients", str(out), "--step-model", "linear=0.5")
    assert run.returncode == 2 and "not both" in run.stderr


def test_several_devices_are_refused() -> None:
    words = [sys.executable, "-m", "dsv4.cli", "calibrate", "--tensor-parallel-size", "2"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 2 and "calibrate measures one device" in run.stderr
