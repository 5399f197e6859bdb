"""Memory is looked at before it is taken: what does not fit is refused in one line that says what would."""

from __future__ import annotations

import dataclasses
import errno
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from dsv4._core import LayoutSpec
from dsv4.cache.paged import PagedCache
from dsv4.cli import main
from dsv4.config import EngineConfig, default_step_tokens
from dsv4.engine import memory
from dsv4.engine.build import build_engine
from dsv4.engine.memory import Demand, Free, allocating, check_fits, demand_of
from dsv4.errors import ConfigError
from dsv4.host_memory import Bound
from dsv4.model.config import ModelConfig
from dsv4.plan.weights import Weights
from dsv4.quantities import parse_bytes

GIB = 2**30
NANO = ModelConfig.from_dir(str(resources.files("dsv4") / "data" / "nano"))
LAYOUT: LayoutSpec = NANO.layout("float32", "float32", block_tokens=256)


def demand(**settings: object) -> tuple[EngineConfig, Demand]:
    config = EngineConfig(device="cpu", **settings)  # type: ignore[arg-type]
    tokens = config.max_num_batched_tokens or default_step_tokens("cpu", config.max_num_seqs)
    config = dataclasses.replace(config, max_num_batched_tokens=tokens)
    return config, demand_of(config, NANO, Weights.released(NANO), LAYOUT, held="float32", width=4)


FREE = Free(8 * GIB, "/sys/fs/cgroup/memory.max")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 100_000),
        ("num_pages", 2_000_000_000),
        ("max_num_batched_tokens", 2_000_000_000),
        ("max_num_batched_tokens", 300_000),
        ("kv_cache_memory", 200 * GIB),
        ("kv_cache_memory", 8 * GIB),
    ],
)
def test_the_setting_that_asks_for_too_much_is_named_with_the_largest_value_that_fits(
    name: str, value: int
) -> None:
    with pytest.raises(ConfigError) as e:
        check_fits(*demand(**{name: value}), FREE)
    text = str(e.value)
    assert text.startswith(f"{name} is ") and "8.00 GiB that are free (/sys/fs/cgroup/memory.max)" in text
    said = re.fullmatch(r".*; the largest that fits is (\S+)", text)
    assert said, text
    fits = parse_bytes(said[1]) if name == "kv_cache_memory" else int(said[1])
    check_fits(*demand(**{name: fits}), FREE)
    with pytest.raises(ConfigError):
        check_fits(*demand(**{name: fits + (GIB // 5 if name == "kv_cache_memory" else 1)}), FREE)


def test_of_two_that_ask_for_too_much_the_larger_is_named_first() -> None:
    with pytest.raises(ConfigError, match=r"num_pages is 1000000, .* the largest that fits is \d+") as e:
        check_fits(*demand(num_pages=1_000_000, max_num_seqs=100_000), FREE)
    assert int(str(e.value).rpartition(" ")[2]) > 1000


def test_weights_that_do_not_fit_are_told_as_such() -> None:
    with pytest.raises(
        ConfigError, match=r"the model does not fit: .* of weights as float32\), and 1\.00 MiB are free"
    ):
        check_fits(*demand(), Free(2**20, "the machine's memory"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-cache-memory", "200TiB"],
        ["--max-num-seqs", "100000000"],
        ["--num-pages", "2000000000"],
        ["--max-num-batched-tokens", "1" + "0" * 15],
        ["--block-size", "1073741824"],
        ["--num-pages", "1" + "0" * 30],
        ["--kv-cache-memory", "1" + "0" * 40],
        ["--replay-tokens", "99999999999"],
        ["--max-wait", "1e300"],
        ["--record-steps", "/nowhere/steps"],
    ],
    ids=" ".join,
)
def test_the_command_line_answers_with_one_line(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--device", "cpu", *flags, "hello"]) == 2
    out, err = capfd.readouterr()
    name = flags[0].removeprefix("--").replace("-", "_").replace("block_size", "block_tokens")
    assert out == "" and err.count("\n") == 1, err
    assert re.match(rf"dsv4: error: .*{name}", err), err


def test_the_pool_of_a_container_is_a_quarter_of_what_the_container_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a host with more than that."""
    monkeypatch.setattr(
        memory, "host_memory", lambda: [Bound(GIB, 2 * GIB, "memory.max"), Bound(99 * GIB, 99 * GIB, "")]
    )
    built = build_engine(EngineConfig(device="cpu"))
    assert GIB // 5 < built.memory.pool <= GIB // 4
    with pytest.raises(
        ConfigError, match=r"kv_cache_memory is 1\.00 GiB.*1\.00 GiB that are free \(memory\.max\)"
    ):
        build_engine(EngineConfig(device="cpu", kv_cache_memory=GIB))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_pool_on_the_cpu_takes_memory_when_it_is_written_and_not_before() -> None:
    before = resident()
    cache = PagedCache(LAYOUT, (GIB // 2) // LAYOUT.page_bytes, 1)
    assert resident() - before < GIB // 8
    assert not cache.pages[-1].any() and not cache.pages[0].any() and not cache.slabs.any()
    cache.pages.fill_(1)
    assert resident() - before > GIB // 4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines"),
        MemoryError("Unable to allocate 182. GiB for an array"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_allocation_that_fails_all_the_same_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(ConfigError, match=r"memory ran out at start \(.*\); lower --num-pages") as e,
        allocating("lower --num-pages"),
    ):
        raise error
    assert "\n" not in str(e.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), allocating("lower --num-pages"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(FileNotFoundError), allocating("lower --num-pages"):
        raise FileNotFoundError(errno.ENOENT, "No such file")
