"""Settings from flags, environment and YAML."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from dsv4.config import EngineConfig, ServerConfig, add_flags, load, parse_bytes
from dsv4.errors import ConfigError


def parse(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, ServerConfig)
    return vars(parser.parse_args(argv))


def test_precedence_is_flag_then_environment_then_yaml(tmp_path: Path) -> None:
    file = tmp_path / "dsv4.yaml"
    file.write_text("max-num-seqs: 3\nmax_num_waiting: 4\nport: 5\n")
    flags = parse("--max-num-seqs", "1")
    engine, server = load(
        [EngineConfig, ServerConfig], flags, {"DSV4_MAX_NUM_SEQS": "2", "DSV4_MAX_NUM_WAITING": "7"}, file
    )
    assert (engine.max_num_seqs, engine.max_num_waiting, server.port) == (1, 7, 5)


def test_types_and_units() -> None:
    flags = parse("--kv-cache-memory-bytes", "2GiB", "--no-enable-prefix-caching", "--drain-timeout", "1.5")
    engine, server = load([EngineConfig, ServerConfig], flags, {})
    assert (
        engine.kv_cache_memory == 2 * 2**30
        and not engine.enable_prefix_caching
        and server.drain_timeout == 1.5
    )
    assert [parse_bytes(s) for s in ("1048576", "500MB", "1.5 GiB", "3k")] == [
        1048576,
        500 * 10**6,
        3 * 2**29,
        3000,
    ]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"DSV4_MAX_NUM_SEQ": "2"}, ["max_num_seq", "did you mean 'max_num_seqs'"]),
        ({"DSV4_DTYPE": "float64"}, ["dtype", "float64", "float32"]),
        ({"DSV4_MAX_NUM_SEQS": "many"}, ["max_num_seqs", "many", "whole number"]),
        ({"DSV4_MAX_NUM_SEQS": "0"}, ["max_num_seqs", "0", "1"]),
        ({"DSV4_PORT": "70000"}, ["port", "70000", "65535"]),
        ({"DSV4_KV_CACHE_MEMORY": "lots"}, ["kv_cache_memory", "lots", "2GiB"]),
        ({"DSV4_MAX_NUM_BATCHED_TOKENS": "8"}, ["max_num_batched_tokens", "8", "16"]),
    ],
)
def test_bad_values_name_field_value_and_remedy(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load([EngineConfig, ServerConfig], {}, env)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load([EngineConfig], {}, {}, tmp_path / "none.yaml")
