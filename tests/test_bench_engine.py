"""`make bench-engine` in a small world on the CPU: it must not die on a GPU of a slip."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dsv4._core")

from dsv4 import LLM
from dsv4.model.config import ModelConfig

from benches import grammar_step
from benches.engine import __main__ as bench
from benches.engine import report, vllm
from benches.engine.driver import Driver, by_kernel
from benches.engine.limits import Limits, Rates, measured
from benches.engine.model import flash
from benches.engine.parts import PARTS, Shapes, parts
from tests.support.checkpoints import write_random

FIGURES = r"free ([\d.]+) ms a step, held ([\d.]+) ms: (-?[\d.]+)% more; masks ([\d.]+) ms"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small world. The prompts have whole pages, so that they can be cached."""
    model = write_random(tmp_path_factory.mktemp("small") / "tiny", compress_ratios=[0, 4, 128])
    flags = "--device cpu --rows 2 1 --context 24 --contexts 100 --turns 150 --prompts 40 300 --max-len 1200 --step-tokens 128 --steps 2 --step-ms 0"
    return ["--model", str(model), *flags.split(), "--pool", "0.2", "--steps-too"]


def test_every_part_is_measured_and_written(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those in processes of their own are stood in for; they say nothing of memory, as their parent's counts there."""
    asked: list[list[str]] = []

    def process(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        bench.main([*command[3:], "--only"])  # as it is, but for what takes time
        return SimpleNamespace(returncode=0)

    said = LLM.describe
    on_a_gpu = "memory     weights 1.00 GiB; in all 2.00 GiB of 80.00 GiB, planned 2.00 GiB"
    monkeypatch.setattr(LLM, "describe", lambda llm: [*said(llm), on_a_gpu])
    monkeypatch.setattr(bench.subprocess, "run", process)
    assert bench.main([*small, "256", "--out", str(tmp_path)]) == 0
    said_of = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert (said_of.count("memory"), said_of.count("scheduler")) == (1, 3)
    (path,) = tmp_path.glob("cpu/engine-tiny-*.json")
    found = json.loads(path.read_text())
    assert "--rows 2 1" in found["command"] and str(tmp_path) not in found["command"]
    assert [len(found[part]) for part in PARTS] == [1, 2, 2, 3, 1, 1, 2]
    assert all(row["limit_ms"] > 0 and row[row["against"]] > 0 for part in PARTS for row in found[part])
    assert [row["kernels"] for row in found["starts"]] == ["to be compiled", "in the cache"]
    assert (
        all(row["not_cached"] < row["tokens"] + row["new"] for row in found["cached"])
        and "failed" not in found
    )
    assert (
        len(asked) == 2
        and "--keep-cache" in asked[0]
        and asked[1][-8:-2] == ["--only", "prefill", "--step-tokens", "256", "--prompts", "300"]
    )
    text, drawn = path.with_suffix(".md").read_text(), path.with_suffix(".svg").read_text()
    assert (
        "## Decode steps\n" in text
        and "memory weights 1.00 GiB" in text
        and "start: start_s " in text
        and drawn.count("<rect") == 1 + 12
    )


def test_a_budget_leaves_out_the_rest_and_writes_what_there_is(tmp_path: Path, small: list[str]) -> None:
    assert bench.main([*small, "--out", str(tmp_path), "--budget", "0.001"]) == 0
    (path,) = tmp_path.glob("cpu/engine-tiny-*.json")
    found = json.loads(path.read_text())
    assert len(found["starts"]) == 1 and not any(part in found for part in PARTS)
    assert found["left out"] == [
        "first",
        *["decode"] * 2,
        "prefill",
        *["cached"] * 3,
        "turns",
        "beside",
        *["long"] * 2,
        "prefill",
        "start with a cache",
    ]
    assert "Left out, as there was no time: first, decode" in path.with_suffix(".md").read_text()


def test_a_part_that_fails_does_not_cost_the_others(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(driver: Driver, *_: int) -> dict[str, Any]:
        driver.job(driver.ids(9), 5)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("benches.engine.parts.cold", broken)
    monkeypatch.setattr(bench, "others", lambda run: None)
    assert bench.main([*small, "--only", "prefill", "decode", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("cpu/engine-tiny-*.json")
    found = json.loads(path.read_text())
    assert len(found["decode"]) == 2 and found["failed"][0] == {
        "part": "prefill",
        "error": "RuntimeError: no such kernel",
    }


def test_the_most_valuable_parts_come_first() -> None:
    shapes = Shapes((8, 1, 64), 4096, (131072,), (2048, 32768), 4096, 2**20)
    assert [p.name for p in parts(shapes, PARTS)][:8] == [
        "first",
        *["decode"] * 2,
        "prefill",
        *["cached"] * 3,
        "beside",
    ]
    assert [p.name for p in parts(shapes, ("long",))] == ["long", "long"]


def test_limits_are_bytes_and_flops_by_the_rates_of_the_run() -> None:
    """Twice the rates, half the time; a lone token of Flash reads its weights and six experts of each layer."""
    flash = ModelConfig.preset("v4-flash")
    layout = flash.layout("fp8_ds_mla", "mxfp4")
    one, two = (Limits(flash, layout, Rates(4 * n, 800 * n, 1600 * n)) for n in (1, 2))
    assert one.decode(1, 4096) == pytest.approx(2 * two.decode(1, 4096))
    experts = (
        flash.num_layers
        * flash.experts_per_token
        * 3
        * flash.hidden_size
        * flash.moe_intermediate_size
        * 17
        / 32
    )
    assert experts / 4e9 < one.decode(1, 4096) < 4 * experts / 4e9
    assert one.decode(8, 4096) < 8 * one.decode(1, 4096) and one.decode(1, 2**20) > one.decode(1, 4096)
    assert one.prompt(8192, 4096) == pytest.approx(one.ms([(0, 4096)]) + one.ms([(4096, 4096)]))


class FakeVllm:
    """As much of vLLM's engine as is used."""

    def __init__(self) -> None:
        self.live: dict[str, list[int]] = {}

    def add_request(self, key: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.live[key] = [0, params.max_tokens]

    def step(self) -> list[Any]:
        outputs = []
        for key, state in list(self.live.items()):
            state[0] += 1
            outputs.append(
                SimpleNamespace(
                    request_id=key,
                    outputs=[SimpleNamespace(token_ids=list(range(state[0])))],
                    finished=state[0] == state[1],
                    num_cached_tokens=3,
                )
            )
            if state[0] == state[1]:
                del self.live[key]
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def abort_request(self, keys: list[str]) -> None:
        for key in keys:
            self.live.pop(key, None)


def test_the_same_jobs_run_on_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "vllm", SimpleNamespace(SamplingParams=lambda **k: SimpleNamespace(**k))
    )
    engine = object.__new__(vllm.Vllm)
    engine._engine, engine._jobs, engine._count, engine.vocab = FakeVllm(), {}, 0, 1000
    engine.on_gpu = False
    driver = Driver(engine, steps=4)
    job = driver.job(np.arange(5, dtype=np.int32), 3)
    driver.run()
    assert len(job.times) == 3 and job.cached == 3 and not engine._jobs
    figures = bench.parts(Shapes((2,), 24, (), (40,), 64, 1600), ("decode", "prefill", "cached", "beside"))
    assert all(part.run(driver)[part.against] >= 0 for part in figures)


def test_an_engine_on_the_cpu_is_not_measured_by_the_gpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its rates a small model's limit would be zero, and its steps are idle there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    run = bench.Run(bench.parsed(["--device", "cpu"]), [])
    assert not run.on_gpu and run.found["device"] == "cpu"
    assert 0 < measured(on_gpu=run.on_gpu).copy_tb_s < 2
    steps: list[int] = []
    engine = SimpleNamespace(on_gpu=False, step=lambda: steps.append(1))
    assert Driver(engine).busy(3) == {} and len(steps) == 3  # type: ignore[arg-type]


def test_the_engine_beside_is_shown() -> None:
    row = {"rows": 8, "context": 4096, "wall_ms": 2.0, "limit_ms": 1.0, "against": "wall_ms"}
    found = {
        "model": "flash",
        "device": "H200",
        "rates": {},
        "decode": [row],
        "vllm": {"decode": [{**row, "wall_ms": 3.0}]},
    }
    assert "| 2.00 | 3.0 |" in report.table(found)
    (bar,) = report._bars("decode", found)
    assert bar["share_of_limit"] == 0.5 and bar["peer_us"] == 3000


def test_masks_are_measured_beside_none(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--device cpu --rows 2 --schemas 2 --context 16 --steps 2 --rounds 1 --pool 0.1"
    assert grammar_step.main(flags.split()) == 0
    free, held, more, masks = map(float, re.search(FIGURES, capsys.readouterr().out).groups())  # type: ignore[union-attr]
    assert masks > 0 and abs(100 * (held / free - 1) - more) < 0.2


def test_masks_are_measured_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row gets tokens of its form, and the parts of a step are all of it."""
    flags = "--scripted 4 --rows 3 --schemas 2 --context 16 --steps 5 --rounds 1 --pool 0.1"
    assert grammar_step.main(flags.split()) == 0
    said = capsys.readouterr().out
    assert "scripted, 4.0 ms" in said and float(re.search(FIGURES, said)[1]) > 3.5  # type: ignore[index]
    held = dict(part.split() for part in re.search("held: (.*)", said)[1].split(", "))  # type: ignore[index]
    assert set(held) == {"draw", "launch", "masks", "rest", "told", "wait"}
    assert sum(map(float, held.values())) > 3.5


def test_prompts_leave_room_for_answers() -> None:
    asked = bench.parsed(["--model", "nano", "--max-len", "32768"])
    found = bench.shapes(asked, 4096)
    assert found.prompts == (2048, 8192, 32768 - 1026)
    assert {part.name for part in parts(found, PARTS)} >= {"prefill", "cached", "beside"}
    assert bench.fitting(10, 5) == 2


def test_flash_may_have_all_its_layers() -> None:
    whole, eight = (ModelConfig.from_dir(flash(n)) for n in (43, 8))
    assert (whole.num_layers, eight.num_layers) == (43, 8)
    assert len(whole.compress_ratios) == 43 and eight.compress_ratios == (4, 128) * 4


def test_where_a_steps_time_goes_is_by_kernel_and_short() -> None:
    torchs = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, 3>(int)"
    launched = [("mine", 10.0, 14.0), ("mine", 0.0, 2.0), (torchs, 0.5, 3.0), ("Memcpy HtoD", 2.0, 2.25)]
    rows = by_kernel(launched, 2)
    assert rows[0] == {"kernel": "mine", "launches": 1.0, "us": 3.0, "chain_us": 3.0}
    assert rows[1]["kernel"] == "vectorized_elementwise_kernel CUDAFunctor_add"
    assert (rows[1]["us"], rows[1]["chain_us"]) == (1.25, 0.375)  # what ends in between puts off the end too
    assert sum(row["chain_us"] for row in rows) == 3.5  # the union of 0 to 3 and 10 to 14, by two steps
    many = [{"kernel": f"k{i}", "launches": 1.0, "us": 2.0, "chain_us": 1.0} for i in range(report.MOST + 3)]
    found = {
        "model": "m",
        "device": "d",
        "rates": {},
        "where": [{"part": "decode", "rows": 8, "kernels": many}],
    }
    text = report.table(found)
    assert "### A step of decode, rows 8: its kernels" in text and "| 3 others | 3.0 | 6.0 | 3.0 |" in text
