"""The step model of a real device, and its fit to measured steps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from dsv4 import LLM, SamplingParams
from dsv4._core import StepModel
from dsv4.errors import ConfigError
from dsv4.gpus import gpu
from dsv4.model.config import ModelConfig
from dsv4.simulate.calibrate import calibrate, read_steps
from dsv4.simulate.device import ARITHMETIC, READS, Shares, parse_overrides, step_coefficients

FLASH = ModelConfig.preset("v4-flash")
LAYOUT = FLASH.layout("fp8_ds_mla", "mxfp4")
IDEAL = Shares(1, 1, 1, 1, 1, 1, kernel_us=1e-9, copy_launch_us=1e-9)


def time_us(coefficients: dict[str, float], rows: list[tuple[int, int]], copies: int = 0) -> float:
    fixed, pairs = StepModel(coefficients).parts(rows, copies)
    return fixed + sum(max(p) for p in pairs)


def test_a_decode_at_the_roofline_reads_what_the_specification_says() -> None:
    """Flash on one H100 at a million tokens: index keys 357 MB, HCA 91 MB, 512 rows in 21 layers, all windows."""
    c = step_coefficients(FLASH, LAYOUT, gpu("h100"), 1, IDEAL)
    per_us = gpu("h100").copy_bytes_per_s / 1e6
    attention = (time_us(c, [(2**20 - 1, 1)]) - time_us(c, [(0, 1)])) * per_us
    context = 2**20 * (21 * 68 / 4 + 20 * 584 / 128)
    assert attention == pytest.approx(context + 512 * 21 * 584, rel=1e-3)
    # 13 billion weights work on a token, the head and the embedding apart.
    flops = c["token_us"] * gpu("h100").fp8_flops / 1e6
    assert flops / 2 == pytest.approx(12.4e9, rel=0.05)
    # One token touches 6 of 256 experts of 147 GB; a step of many tokens all of them.
    assert c["expert_read_us"] * per_us == pytest.approx(147.2e9, rel=0.01)
    one, all_of_them = (StepModel(c).parts([(0, n)], 0)[1][0][0] for n in (1, 4000))
    assert one - c["dense_read_us"] == pytest.approx(c["expert_read_us"] * 6 / 256)
    assert all_of_them == pytest.approx(c["dense_read_us"] + c["expert_read_us"])


def test_more_gpus_divide_weights_and_history() -> None:
    one, four = (step_coefficients(FLASH, LAYOUT, gpu("b200"), tp, IDEAL) for tp in (1, 4))
    assert four["expert_read_us"] == pytest.approx(one["expert_read_us"] / 4)
    assert one["token_us"] / 4 < four["token_us"] < one["token_us"] / 3
    for name in ("context_read_us", "entry_read_us", "row_read_us", "context_us", "query_us", "entry_us"):
        assert four[name] == pytest.approx(one[name] / 4)
    assert one["collective_us"] == 0 < four["collective_us"]


def test_overrides_are_shares_or_coefficients() -> None:
    shares, direct = parse_overrides("linear=0.3, overhead_us=900")
    assert (shares, direct) == (Shares(linear=0.3), {"overhead_us": 900.0})
    for text, words in (
        ("linear", "name=number"),
        ("lineal=1", "did you mean 'linear'"),
        ("linear=0", "above 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_overrides(text)


def measured(path: Path, coefficients: dict[str, float], noise: float) -> None:
    rng, lines = random.Random(1), []
    for _ in range(120):
        rows = [[rng.randrange(1000, 300_000), 1] for _ in range(rng.choice((0, 1, 8, 64)))]
        if not rows or rng.random() < 0.5:
            rows.append([rng.randrange(0, 500_000), rng.choice((64, 512, 4096))])
        copies = rng.randrange(3)
        us = time_us(coefficients, [(a, n) for a, n in rows], copies) * (1 + noise * rng.uniform(-1, 1))
        lines.append(json.dumps({"us": us, "rows": rows, "copies": copies}))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.1, 0.1)])
def test_a_fit_finds_the_scales_that_made_the_times(tmp_path: Path, noise: float, tolerance: float) -> None:
    start = step_coefficients(FLASH, LAYOUT, gpu("h200"), 4)
    true = (
        start
        | {"overhead_us": 4200.0}
        | {k: 1.7 * start[k] for k in READS}
        | {k: 2.6 * start[k] for k in ARITHMETIC}
    )
    measured(tmp_path / "steps", true, noise)
    fit = calibrate(start, read_steps(str(tmp_path / "steps")))
    assert (fit.overhead_us, fit.reads, fit.arithmetic) == pytest.approx((4200, 1.7, 2.6), rel=tolerance)
    assert fit.median_error <= noise + 1e-12 and fit.before > 0.3
    numbers = {k: v for k, v in true.items() if not isinstance(v, list)}
    assert {k: fit.coefficients[k] for k in numbers} == pytest.approx(numbers, rel=tolerance)
    assert {k: fit.coefficients[k] for k in true if k not in numbers} == {
        k: v for k, v in true.items() if k not in numbers
    }
    assert "120 measured steps" in str(fit) and f"{fit.median_error:.1%} median" in str(fit)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "no JSON"]),
        ("[]", ["line 2", "us and rows"]),
        ('{"us": 0, "rows": [[0, 1]]}', ["line 2", "us is 0"]),
        ('{"us": 5, "rows": []}', ["line 2", "rows is []"]),
        ('{"us": 5, "rows": [[0, 0]]}', ["line 2", "[0, 0]"]),
        ('{"us": 5, "rows": [[0, 1]], "copies": -1}', ["line 2", "copies is -1"]),
        ("", ["1 measured steps", "at least 3"]),
    ],
)
def test_bad_measurements_are_told_in_one_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "steps"
    path.write_text('{"us": 5, "rows": [[0, 1]]}\n' + line)
    with pytest.raises(ConfigError) as e:
        read_steps(str(path))
    assert all(w in str(e.value) for w in (str(path), *words)) and "\n" not in str(e.value)


def test_a_served_models_steps_can_be_fitted(tmp_path: Path) -> None:
    """The engine writes what the fit reads: every step with its rows, replays included."""
    path = str(tmp_path / "steps.jsonl")
    llm = LLM(
        max_num_seqs=2,
        max_model_len=1024,
        record_steps=path,
        snapshot_policy="none",
        max_num_batched_tokens=128,
    )
    prompt = list(range(10, 310))
    for text in (prompt, prompt):
        llm.generate([text], SamplingParams(max_tokens=4, temperature=0))
    steps = read_steps(path)
    rows = [r for s in steps for r in s.rows]
    # Twice the prompt and three of the four tokens; what the second one knows it may take from the cache or run again.
    assert [n for _, n in rows[:6]] == [128, 128, 44, 1, 1, 1] and rows[5] == (302, 1)
    assert rows[-1] == (302, 1) and sum(n for _, n in rows[6:]) in (47, 303)
    recorded = [r for line in Path(path).read_text().splitlines() for r in json.loads(line)["rows"]]
    assert {end for _, _, end in recorded} <= {0, 256}
    fit = calibrate(step_coefficients(FLASH, LAYOUT, gpu("h100"), 1), steps)
    assert fit.steps == len(steps) and fit.median_error < 1
