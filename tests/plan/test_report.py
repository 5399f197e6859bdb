"""`dsv4 plan` as users call it, its worked example, and that the engine agrees with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4.backends import choose
from dsv4.cache.paged import PagedCache
from dsv4.cli import main
from dsv4.config import EngineConfig, default_step_tokens
from dsv4.engine.build import build_engine
from dsv4.engine.memory import check_fits, demand_of, room_for_pages, usable_memory
from dsv4.errors import ConfigError
from dsv4.gpus import GPUS
from dsv4.kernels.triton.forms import INDEX_SCRATCH
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release
from dsv4.model.parallel import Parallel
from dsv4.model.v4 import V4Model
from dsv4.model.weights import load_weights
from dsv4.ops.forms import Dims
from dsv4.ops.registry import Ops
from dsv4.plan.build import divide
from dsv4.plan.graphs import steps_of
from dsv4.plan.weights import Weights, weight_rows
from dsv4.plan.workspace import MULTIPROCESSORS, Limits, bound, workspace

from tests.support.models import random_config, random_config_dict, random_weights

GUIDE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
NANO = str(resources.files("dsv4") / "data" / "nano")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```console\n(.*?)```", GUIDE, re.DOTALL)
    command, *shown = block.splitlines()
    assert main(command.removeprefix("$ dsv4 ").split()) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    for line in shown:
        if line != "…":
            assert any(line == p for p in printed), f"not printed, or not in this order: {line}"


PROFILES = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        ("v4-pro --gpu b200 --num 8 --tp 8", "HGX B200 | V4-Pro as one engine of eight | {} "),
        ("v4-flash --gpu b200", "| V4-Flash as eight engines of one, or four of two | {} each"),
        ("v4-flash --gpu b200 --num 2 --tp 2", "eight engines of one, or four of two | 3.3M each; {} each "),
        ("v4-pro --gpu h200 --num 8 --tp 8", "8 x H200 | V4-Pro as one engine of eight | {} "),
        ("v4-flash --gpu h200 --num 2 --tp 2", "| 2 x H200 | V4-Flash as one engine | {} "),
        (
            "v4-flash --gpu h200 --num 4 --tp 4",
            "| V4-Flash as four engines of two, or two of four | 27M each; {} each ",
        ),
    ],
)
def test_the_guide_from_gpus_to_an_endpoint_has_the_planner_s_tokens(
    capsys: pytest.CaptureFixture[str], arguments: str, row: str
) -> None:
    capacity = plan(capsys, *arguments.split(), "--profile", "mixed")["capacity"]
    millions = next(c["tokens"] for c in capacity if c["policy"] == "none") / 1e6
    assert row.format(f"{millions:.0f}M" if millions > 10 else f"{millions:.1f}M") in PROFILES


def test_it_starts_without_torch() -> None:
    code = (
        "import sys; from dsv4.cli import main; "
        "assert main(['plan', 'v4-flash', '--gpu', 'h200', '--num', '2']) == 0; sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_json_has_the_numbers_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    p = plan(capsys, "v4-flash", "--gpu", "b200", "--num", "8", "--dp", "8", "--max-num-seqs", "64")
    assert p["release"] == {"tensors": 72_317, "bytes": 166_878_536_440, "published": 166_878_536_440}
    memory, layout = p["memory"], p["layout"]
    assert memory["weights"] == sum(row["rank"] for row in p["weights"])
    assert memory["slabs"] == 64 * layout["slab_bytes"]
    assert memory["pool"] == memory["pages"] * layout["page_bytes"]
    assert 0 <= int(0.9 * p["gpu"]["memory_bytes"]) - memory["total"] < layout["page_bytes"]
    by_policy = {row["policy"]: row for row in p["capacity"]}
    assert by_policy["none"]["tokens_in_all"] == 8 * by_policy["none"]["tokens"] == 8 * 256 * memory["pages"]
    chosen = [row for row in p["what_if"] if row["parallel"] == p["parallel"]["name"]]
    assert [row["capacity"] for row in chosen] == [by_policy["auto"]]
    assert any("= 3,514.2500 B" in line for line in p["how"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["v4-por", "--gpu", "b200"], "model is 'v4-por'; .*did you mean 'v4-pro'"),
        (["v4-pro", "--gpu", "b20"], "gpu is 'b20'; .*did you mean 'b200'"),
        (["v4-pro", "--gpu", "4090"], r"gpu is '4090'; known are [\w, ]+\n$"),
        (
            ["v4-pro", "--gpu", "b200", "--revision", "main"],
            "revision is 'main', but v4-pro is a config that ships",
        ),
        (
            ["v4-pro", "--gpu", "h100", "--num", "8"],
            r"v4-pro does not fit on 8 x h100 as TP8: a GPU needs .*for more of them with --num$",
        ),
        (
            ["v4-flash", "--gpu", "b200", "--max-num-seqs", "1000000"],
            r"of them states of running requests\) .*; plan for a smaller --max-num-seqs$",
        ),
        (
            ["v4-flash", "--gpu", "b200", "--max-num-batched-tokens", "8M"],
            r"of them workspace\) .*; plan for a smaller --max-num-batched-tokens$",
        ),
        (
            ["v4-pro", "--gpu", "b200", "--num", "8", "--max-len", "2000000"],
            "--max-model-len is 2000000; .* 1048576",
        ),
        (
            ["v4-pro", "--gpu", "b200", "--num", "8", "--pool-gb", "0.5"],
            "max_len is 1048576; .*--max-len 793600 or less",
        ),
        (["v4-pro", "--gpu", "b200", "--every", "2048,x"], "--every has 'x'"),
        (
            ["v4-pro", "--gpu", "b200", "--block-size", "100"],
            "block_size is 100; it must be a multiple of 128",
        ),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err), err


def test_a_plan_of_several_gpus_says_how_it_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    for layout, servable, said in (
        (["--num", "2"], True, "\nserve    dsv4 serve MODEL --tensor-parallel-size 2\n"),
        (
            ["--num", "2", "--dp", "2"],
            False,
            "\nserve    an engine is one group of tensor-parallel ranks; data",
        ),
        ([], True, "\ncache "),
    ):
        flags = ["v4-flash", "--gpu", "b300", *layout]
        assert plan(capsys, *flags)["servable_today"] is servable
        assert main(["plan", *flags]) == 0
        out = capsys.readouterr().out
        assert said in out and ("\nserve " in out) is bool(layout)


def test_the_engine_has_the_planned_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, pages, slabs and plans of a running engine, and the plan of the same settings."""
    built = build_engine(
        EngineConfig(device="cpu", kv_cache_memory=3_000_000, max_num_seqs=3, max_num_batched_tokens=64)
    )
    flags = ["--rows", "float32", "--index", "float32", "--weights", "float32", "--pool-gb", "0.003"]
    flags += ["--max-num-seqs", "3", "--max-step-tokens", "64", "--max-len", str(built.max_model_len)]
    p = plan(capsys, NANO, "--gpu", "h100", *flags)
    memory, words = built.memory, built.loop.plans[0].words
    assert (p["memory"]["weights"], p["memory"]["slabs"]) == (memory.weights, memory.slabs)
    assert (p["memory"]["pages"], p["memory"]["pool"]) == (memory.pages, memory.pool)
    assert sum(b["size"] for b in p["workspace"] if b["name"] == "page table") == memory.page_table
    assert [b["size"] for b in p["workspace"] if b["name"].startswith("plans")] == [2 * words.nbytes]


def test_a_gpu_engine_sizes_its_pool_as_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that serve calls on a GPU, told that it is on an idle H200."""
    p = plan(
        capsys, "v4-flash", "--gpu", "h200", "--num", "2", "--tp", "1", "--dp", "2", "--rows", "bfloat16"
    )
    tokens = default_step_tokens("cuda", 16)
    config = EngineConfig(device="cuda", max_num_batched_tokens=tokens)
    limits = Limits(tokens, 16, 2**20, steps_of(16, 2**20, tokens))
    memory = GPUS["h200"].memory_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, memory))
    flash = ModelConfig.preset("v4-flash")
    layout = flash.layout("bfloat16", "mxfp4")
    released = Weights.released(flash)
    one_gpu = divide(flash, released, layout, Parallel(), limits, int(0.9 * memory), held="released")
    demand = demand_of(config, flash, released, layout, held="released", width=2)
    assert room_for_pages(config, demand, usable_memory(config)) == one_gpu.pool < 0  # 145 GB of weights
    with pytest.raises(
        ConfigError, match=r"the model does not fit: .* of weights as released\), and 1.* are free"
    ):
        check_fits(config, demand, usable_memory(config))
    halves = divide(flash, released, layout, Parallel(1, 2, 2), limits, int(0.9 * memory), held="released")
    assert (halves.pool, halves.pages) == (p["memory"]["pool"], p["memory"]["pages"])


def test_packed_weights_take_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in the release's formats, for a backend that multiplies with weights as they are."""
    monkeypatch.setattr(Ops, "prepare", lambda self, op, weight: weight)
    config = random_config()
    export_release(random_weights(config, seed=1), config, random_config_dict(), tmp_path)
    packed = load_weights(tmp_path, config, torch.bfloat16, packed=True)
    layout = config.layout("bfloat16", "bfloat16")
    model = V4Model(config, packed, PagedCache(layout, 1, 1), choose("reference"))
    planned = weight_rows(Weights.released(config), Parallel(), held="released")
    assert model.weight_bytes == sum(r.rank for r in planned)


def test_the_workspace_is_bounded_by_limits_alone() -> None:
    """Eight times the context costs page table and rotary tables, and where a program does not hold all keys of a token the sums of several,
    of some tokens at a time; on several ranks also the history of one layer, which they gather."""
    pro = ModelConfig.preset("v4-pro")
    layout = pro.layout("fp8_ds_mla", "mxfp4")
    parts = "partial results of attention to long histories"
    for tp, gathered in ((1, set()), (8, {"csa", "csa_index"})):
        short, long = (
            workspace(pro, layout, Parallel(tp), Limits(4096, 64, n)) for n in (131_072, 1_048_576)
        )
        grown = {b.name for a, b in zip(short, long, strict=True) if a.size != b.size}
        assert grown == {"page table", "plans, two steps", "rotary tables"} | (
            {parts} if tp == 1 else {"gathered csa_index, in order"}
        ) | {
            f"{name} of {what}"
            for name in gathered
            for what in ("the longest request, gathered", "it that a rank sends")
        }
        assert bound(long) < sum(b.size for b in long)


def test_every_ranks_part_of_a_cut_token_is_counted() -> None:
    """The owner of a token sums all parts of its attention: queries, R parts and the whole lie beside each other, of T / R tokens."""
    flash = ModelConfig.preset("v4-flash")
    for tp in (2, 4, 8):
        layout = flash.layout("fp8_ds_mla", "mxfp4", ranks=tp)
        found = {b.name: b.size for b in workspace(flash, layout, Parallel(tp), Limits(4096, 64, 65_536))}
        one = 4096 // tp * flash.num_heads * flash.head_dim * 2
        assert found["queries and outputs, before and after rotation"] >= (1 + tp + 1) * one


def test_history_is_dealt_out_over_the_ranks_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the GPUs at the same bytes each hold twice the tokens, but for padding; a block grows to rows for every rank."""
    of = {
        n: plan(capsys, "v4-flash", "--gpu", "b200", "--num", str(n), "--tp", str(n), "--pool-gb", "20")
        for n in (1, 2, 4, 8)
    }
    tokens = {n: p["capacity"][1]["tokens_in_all"] for n, p in of.items()}
    assert [p["capacity"][1]["policy"] for p in of.values()] == ["none"] * 4
    for n in (2, 4, 8):
        assert n * tokens[1] * 0.99 < tokens[n] <= n * tokens[1]
        assert of[n]["layout"]["snapshot_bytes"] == of[1]["layout"]["snapshot_bytes"]
        assert of[n]["layout"]["block_tokens"] == max(256, 128 * n)
    # an engine that keeps the window of every token has the same rows on every rank
    windows = [p["capacity"][0]["tokens_in_all"] for p in of.values()]
    assert max(windows) - min(windows) < 0.01 * windows[0]
    attention = {
        name: sum(
            r["rank"]
            for r in plan(capsys, name, "--gpu", "b300", "--num", "8")["weights"]
            if r["group"] == "attention"
        )
        for name in ("v4-flash", "v4-pro")
    }
    assert attention["v4-flash"] == pytest.approx(4.6e9, rel=0.02)  # whole
    assert attention["v4-pro"] < 5e9  # of 18.3


def test_the_index_is_counted_in_the_kernels_own_pieces() -> None:
    kernel = pytest.importorskip("dsv4.kernels.triton.indexer", reason="triton is not installed")
    kernel.State.lists.clear()
    kept = sum(t.nbytes for t in kernel.State.workspace(torch.device("cpu")))
    kernel.State.lists.clear()
    kept += kernel.TOKENS * 4 * max(kernel.SAMPLE, kernel.SAMPLED)
    counted = prod(n for _, n in INDEX_SCRATCH.factors(Dims(4096, 512, 132, 64, 640)))
    assert counted <= kept <= 1.001 * counted  # beside a counter a query


def test_sums_of_attention_to_a_long_history_are_counted() -> None:
    """More than 32 blocks of 64 keys are shared by several programs, whatever there is to do."""
    flash = ModelConfig.preset("v4-flash")
    layout, name = flash.layout("fp8_ds_mla", "mxfp4"), "partial results of attention to long histories"
    found = {
        n: {b.name: b.size for b in workspace(flash, layout, Parallel(), Limits(4096, 8, n))}
        for n in (131_072, 1_048_576)
    }
    assert name not in found[131_072]
    assert found[1_048_576][name] == 16 * MULTIPROCESSORS * 64 * 512 * 4


def test_a_smaller_part_of_a_model_needs_fewer_bytes() -> None:
    flash = ModelConfig.preset("v4-flash")
    ranks = [
        sum(r.rank for r in weight_rows(Weights.released(flash), p, held="released"))
        for p in (Parallel(), Parallel(2), Parallel(4), Parallel(8))
    ]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] / ranks[3] > 6
