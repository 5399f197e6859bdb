"""Profiles: what ships holds together, what comes before what, and what is said of a wrong one."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from dsv4 import profiles
from dsv4.cli import build_parser, main
from dsv4.cli.common import note_sources
from dsv4.config import EngineConfig, ServerConfig, load, profile_diff, settle, with_profile
from dsv4.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXCERPT = str(ROOT / "tests/data/traces/mooncake_200.jsonl")
NAMES = profiles.names()


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_there_is_one_for_each_kind_of_traffic() -> None:
    assert NAMES == ["chat", "coding-agent", "long-agent", "long-document", "rollout", "mixed"]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_valid_and_explained(name: str) -> None:
    found = profiles.read(name)
    assert all((found.traffic, found.optimises, found.gives_up))
    assert set(found.settings) == set(profiles.read("mixed").settings)
    load([EngineConfig, ServerConfig], {"profile": name}, {})
    lines = found.text.splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"\w+ = ", line) and line.split(" ")[0] not in profiles.ABOUT:
            assert above.startswith("# "), line


def test_the_first_that_says_something_counts(tmp_path: Path) -> None:
    own = written(
        tmp_path,
        "[settings]\nmax-num-seqs = 1\nmax_num_waiting = 2\nmax_wait = 3\nport = 4\neviction = 'lru'\n",
    )
    yaml = tmp_path / "dsv4.yaml"
    yaml.write_text(f"profile: {own}\nport: 14\nmax_wait: 13\nmax_num_waiting: 12\n")
    env = {"DSV4_MAX_WAIT": "23", "DSV4_MAX_NUM_WAITING": "22"}
    engine, server = load([EngineConfig, ServerConfig], {"max_num_waiting": "32"}, env, yaml)
    assert (engine.max_num_seqs, engine.max_num_waiting, engine.max_wait, server.port) == (1, 32, 23, 14)
    assert engine.eviction == "lru" and engine.profile == own
    # of two profiles the one that counts is read alone
    engine = load([EngineConfig], {"profile": "none"}, env, yaml)[0]
    assert engine.max_num_seqs == 16 and engine.eviction == "value" and engine.profile is None
    engine = load([EngineConfig], {"profile": "chat"}, {"DSV4_PROFILE": "rollout"}, yaml)[0]
    assert (engine.profile, engine.eviction) == ("chat", "value")


def test_python_takes_one_too() -> None:
    rollout = profiles.read("rollout").settings
    values = with_profile({"model": "x", "profile": "rollout", "max_wait": 1.0})
    config = EngineConfig(**values)
    assert (config.model, config.max_wait, config.max_num_seqs) == ("x", 1.0, rollout["max_num_seqs"])
    assert with_profile({"model": "x"}) == with_profile({"model": "x", "profile": "none"}) == {"model": "x"}


def test_where_every_value_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = written(tmp_path, "[settings]\nmax_num_seqs = 7\nmax_wait = 3\nport = 4\n")
    monkeypatch.setenv("DSV4_MAX_WAIT", "5")
    line = f"serve m --profile {own} --max-num-seqs 9 --api-key hush --no-enable-prefix-caching"
    note_sources(build_parser().parse_args(line.split()), EngineConfig, ServerConfig)
    err = capsys.readouterr().err
    told = " ".join(err.split()).split("settings ")
    flags, env, profile, default = told[1:]
    assert flags.startswith("from the command line:") and "hush" not in err
    for part in (
        "model m",
        "max_num_seqs 9 (the profile's is 7)",
        "api_key given",
        "enable_prefix_caching off",
    ):
        assert part in flags
    assert env.strip() == "from the environment: max_wait 5 (the profile's is 3)"
    assert profile.strip() == "from profile own: port 4"
    assert "snapshot_budget 0.1" in default and "max_num_seqs" not in default


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[settings]\n\nmax-num-seq = 3\n", ["line 3", "max_num_seq", "did you mean 'max_num_seqs'"]),
        ("[settings]\nsnapshot_policy = 'fork'\n", ["line 2", "'fork'", "did you mean 'forks'"]),
        ("[settings]\nsnapshot_budget = 90\n", ["line 2", "snapshot_budget is 90", "90% is 0.9"]),
        ("[settings]\nmax_num_seqs = 0\n", ["line 2", "max_num_seqs is 0", "the nearest is 1"]),
        ("[settings]\nmax_num_seqs = [1]\n", ["line 2", "max_num_seqs is [1]", "whole number"]),
        (
            "[settings]\nmax_num_batched_tokens = 8\n",
            ["line 2", "max_num_batched_tokens is 8", "max_num_seqs (16)"],
        ),
        ("[settings]\nmodel = 'x'\n", ["line 2", "model is no setting of a profile"]),
        ("[settings]\napi_key = 'x'\n", ["line 2", "api_key is no setting of a profile"]),
        ("[settings]\nprofile = 'chat'\n", ["line 2", "profile is no setting of a profile"]),
        ("[settings]\nmax-wait = 1\nmax_wait = 2\n", ["max-wait is there twice"]),
        ("[setting]\n", ["unknown key 'setting'", "did you mean 'settings'"]),
        ("settings = 3\n", ["settings is 3", "[settings]"]),
        ("traffic = 3\n", ["traffic is 3", "text"]),
        ("max_num_seqs: 3\n", ["no TOML", "line 1"]),
    ],
)
def test_a_wrong_profile_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    own = written(tmp_path, text)
    for command in (["diff", own], ["show", own]):
        code, out, err = call(capsys, "profiles", *command)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert all(w in err for w in (own, *words)), err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("serve --profile chatt", ["profile 'chatt'", "did you mean 'chat'?", "FILE.toml"]),
        ("generate hi --profile nowhere.toml", ["nowhere.toml", "No such file"]),
        ("simulate x.jsonl --profile coding_agent", ["did you mean 'coding-agent'?"]),
        ("plan v4-flash --gpu b200 --profile rolout", ["did you mean 'rollout'?"]),
        ("profiles shw", ["unknown KIND 'shw'", "did you mean 'show'?"]),
        ("profiles show longdocument", ["did you mean 'long-document'?"]),
    ],
)
def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str], line: str, words: list[str]) -> None:
    code, out, err = call(capsys, *line.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and all(w in err for w in words), err


def test_the_place_that_names_no_profile_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^DSV4_PROFILE: profile 'caht' is not known"):
        load([EngineConfig], {}, {"DSV4_PROFILE": "caht"})


def test_profiles_are_listed_shown_and_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "profiles")
    assert code == 0 and all(re.search(rf"^{name} ", out, re.MULTILINE) for name in NAMES)
    assert out.count("optimises:") == out.count("gives up:") == len(NAMES)
    code, out, _ = call(capsys, "profiles", "show", "rollout")
    assert code == 0 and out == (profiles.FOLDER / "rollout.toml").read_text()
    own = written(tmp_path, out.replace("\nmax_wait =", "\nmax_wait = 77 #"))
    code, out, _ = call(capsys, "profiles", "diff", own, "rollout")
    assert code == 0 and re.search(r"\| max_wait +\| 77.0 +\| ", out) and out.count("|\n") == 3
    code, out, _ = call(capsys, "profiles", "diff", "chat", "chat")
    assert code == 0 and "|" not in out
    assert ("port", "9", "8000") in profile_diff(written(tmp_path, "[settings]\nport = 9\n"), None)


def test_plan_and_simulate_follow_a_profile_and_flags_come_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = written(
        tmp_path,
        "[settings]\nmax_num_seqs = 3\nmax_num_batched_tokens = 777\nsnapshot_policy = 'turns'\neviction = 'lru'\n"
        "index_cache_dtype = 'fp8'\nmax_model_len = '500k'\n",
    )
    line = [
        "simulate",
        EXCERPT,
        "--limit",
        "4",
        "--pool-gib",
        "2",
        "--json",
        "--profile",
        own,
        "--max-num-seqs",
        "5",
    ]
    code, out, err = call(capsys, *line)
    assert code == 0, err
    found = json.loads(out)
    engine = found["engine"]
    assert (engine["profile"], engine["max_num_seqs"], engine["max_num_batched_tokens"]) == (own, 5, 777)
    assert list(found["policies"]) == ["turns/lru"] and engine["max_len"] == 500_000
    code, out, err = call(
        capsys, "plan", "v4-flash", "--gpu", "b200", "--profile", own, "--max-num-seqs", "5"
    )
    assert (
        code == 0 and "index fp8" in out and "500,000 tokens a request, 5 running, 777 tokens a step" in out
    ), err


def test_no_profile_leaves_a_command_as_it_was() -> None:
    assert settle({}, {}) == EngineConfig()
    assert settle({"max_num_seqs": 3}, {"max_num_seqs": 64, "step_ms": "none"}) == EngineConfig(
        max_num_seqs=3, step_ms=None
    )
