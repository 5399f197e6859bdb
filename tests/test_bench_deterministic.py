"""`--deterministic` in an engine, and `benches.deterministic` in a small world on the CPU, where every case must hold."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("dsv4._core")

from dsv4 import LLM

from benches import deterministic as bench
from tests.support.checkpoints import write_random


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random(tmp_path_factory.mktemp("small") / "tiny", compress_ratios=[0, 4, 128]))


def test_every_case_is_equal_and_both_costs_are_written(tmp_path: Path, tiny: str) -> None:
    flags = (
        "--device cpu --prompt 150 --tokens 2 --cold 20 --steps 2 --rows 1 --pool 100 --chunk 40 --kernels 2"
    )
    assert bench.main(["--models", tiny, "--out", str(tmp_path), *flags.split()]) == 0
    found = json.loads((tmp_path / "deterministic.json").read_text())
    assert len({case["case"] for case in found["cases"]}) == 12 and all(
        case["equal"] for case in found["cases"]
    )
    assert [(c["deterministic"], "rows" in c) for c in found["cost"]] == [
        (d, r) for d in (True, False) for r in (False, True)
    ]


def test_a_difference_is_told() -> None:
    one, other = [(5, -1.0, ()), (7, -2.0, ()), (9, -3.0, ())], [(5, -1.0, ()), (7, -2.5, ()), (8, -3.0, ())]
    assert bench.compared(one, one) == {"equal": True}
    assert bench.compared(one, other) == {"equal": False, "first": 1, "of": 3, "apart": 0.5}


@pytest.mark.parametrize("ranks", [1, 2])
def test_start_up_says_for_how_many_ranks(ranks: int, tiny: str) -> None:
    small = dict(device="cpu", max_model_len=256, num_pages=8, max_num_seqs=2, tensor_parallel_size=ranks)
    with closing(LLM(tiny, deterministic=True, **small)) as llm:
        (line,) = [x for x in llm.describe() if x.startswith("bits")]
        company = bench.Company(llm, 40, 3)
        assert company.among(2, last=True) == company.alone()
    assert line.split(maxsplit=1)[1].startswith("deterministic: ")
    assert ("those of 2 ranks" in line) == (ranks == 2)
