"""Settings from flags, environment and YAML."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from dsv4.config import EngineConfig, ServerConfig, load
from dsv4.errors import ConfigError
from dsv4.quantities import counted, parse_bytes, parse_count
from dsv4.settings import add_flags


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
        ({"DSV4_KEYS_FILE": ""}, ["keys_file is empty", "a path"]),
        ({"DSV4_MAX_NUM_BATCHED_TOKENS": "8"}, ["max_num_batched_tokens", "8", "16"]),
    ],
)
def test_bad_values_name_field_value_and_remedy(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load([EngineConfig, ServerConfig], {}, env)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_several_names(tmp_path: Path) -> None:
    file = tmp_path / "dsv4.yaml"
    file.write_text("served-model-name: [a, b]\n")
    for flags, env, yaml in (
        (parse("--served-model-name", "a", "b"), {}, None),
        (parse("--served-model-name", "a", "--served-model-name", "b"), {}, None),
        (parse("--served-model-name", "a, b"), {}, None),
        ({}, {"DSV4_SERVED_MODEL_NAME": "a,b,a"}, None),
        ({}, {}, file),
    ):
        assert load([ServerConfig], flags, env, yaml)[0].served_model_name == ("a", "b")
    assert load([ServerConfig], parse("--served-model-name", "org/a b"), {})[0].served_model_name == (
        "org/a b",
    )
    assert load([ServerConfig], {}, {})[0].served_model_name == ()
    for bad in ("", "a,,b", "x" * 513):
        with pytest.raises(ConfigError, match="a name has 1 to 512 characters"):
            load([ServerConfig], parse("--served-model-name", bad), {})


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load([EngineConfig], {}, {}, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("65536", 65536),
        ("64k", 64_000),
        ("64K", 65_536),
        ("1M", 1_048_576),
        ("1m", 1_000_000),
        ("25.6k", 25_600),
        ("1_000", 1000),
        (" 8 ", 8),
        ("+8", 8),
    ],
)
def test_counts_may_be_written_with_a_unit(text: str, value: int) -> None:
    assert parse_count(text) == value
    (config,) = load([EngineConfig], parse("--max-model-len", text), {})
    assert config.max_model_len == value


@pytest.mark.parametrize(
    "text", ["", "k", "64q", "1.5M", "2.5", "1.0001k", "0x10", "1e3", "1,000", "--8", "٣"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "inf", "nan", "1XB", "1e3", "2 GiBB", "1.2.3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


def test_auto_and_none_leave_a_number_open() -> None:
    (config,) = load([EngineConfig], parse("--max-model-len", "auto", "--step-ms", "none"), {})
    assert config.max_model_len is None and config.step_ms is None
    (server,) = load([ServerConfig], parse("--api-key", "auto"), {})
    assert server.api_key == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: 1\nprot: 2\n", ["line 2", "'prot'", "did you mean 'port'"]),
        ("max-num-seqs: many\n", ["line 1", "max_num_seqs is 'many'", "whole number"]),
        ("# a comment\n\nmax_num_seqs: 2.5\n", ["line 3", "max_num_seqs is '2.5'", "whole number"]),
        ("max_num_seqs:\n", ["line 1", "max_num_seqs is empty", "whole number"]),
        ("max_num_seqs: 0\n", ["line 1", "max_num_seqs is 0"]),
        ("dtype: float64\n", ["line 1", "dtype is 'float64'", "float32"]),
        ("host: {a: 1}\n", ["line 1", "host is {'a': 1}", "text"]),
        ("host: [a, b]\n", ["line 1", "host is ['a', 'b']", "text"]),
        ("port: 1\nmax-num-seqs: 1\nmax_num_seqs: 2\n", ["line 3", "max_num_seqs", "twice", "line 2"]),
        (
            "pipeline_parallel_size: 2\n",
            ["line 1", "pipeline_parallel_size", "one group of tensor-parallel ranks"],
        ),
        ("a: b: c\n", ["line 1", "no YAML"]),
        ("- port\n", ["key: value"]),
        ("a\x00b: 1\n", ["no YAML"]),
    ],
)
def test_an_error_in_a_yaml_file_names_file_line_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "dsv4.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        load([EngineConfig, ServerConfig], {}, {}, file)
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in (str(file), *words)), message


def test_yaml_values_mean_what_they_mean_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "dsv4.yaml"
    text = "\ufeffmax-model-len: 64k\napi_key: 0123\nenable_prefix_caching: off\nstep_ms: null\nkv-cache-memory: 2GiB\n"
    file.write_text(text, encoding="utf-8")
    engine, server = load([EngineConfig, ServerConfig], {}, {}, file)
    assert (engine.max_model_len, server.api_key, engine.enable_prefix_caching) == (64_000, "0123", False)
    assert engine.step_ms is None and engine.kv_cache_memory == 2 * 2**30
    file.write_text("")
    assert load([EngineConfig], {}, {}, file) == [EngineConfig()]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        load([EngineConfig], {}, {}, file)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DSV4_PROT", "1", ["DSV4_PROT", "did you mean 'port'?"]),
        ("DSV4_MAX_NUM_SEQS", "many", ["DSV4_MAX_NUM_SEQS", "max_num_seqs is 'many'"]),
        ("DSV4_PORT", "70000", ["DSV4_PORT", "port is 70000", "65535"]),
        ("DSV4_DATA_PARALLEL_SIZE", "2", ["DSV4_DATA_PARALLEL_SIZE", "one group of tensor-parallel ranks"]),
        ("DSV4_ENFORCE_EAGER", "maybe", ["DSV4_ENFORCE_EAGER", "true or false"]),
    ],
)
def test_an_error_in_the_environment_names_the_variable(name: str, value: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load([EngineConfig, ServerConfig], {}, {name: value})
    assert all(w in str(e.value) for w in words), str(e.value)


def test_one_is_no_plural() -> None:
    assert [counted(n, "request") for n in (0, 1, 2, 1040)] == [
        "0 requests",
        "1 request",
        "2 requests",
        "1,040 requests",
    ]
