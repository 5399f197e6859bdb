"""An option that this file alone knows: one field is its flag, variable, key of the YAML file, help, limits and the core's option."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from dsv4 import _core, config
from dsv4.config import EngineConfig, core_options, load
from dsv4.errors import ConfigError
from dsv4.quantities import Range
from dsv4.settings import add_flags, setting

from tests.support.layouts import v4_layout


@dataclass(frozen=True, slots=True)
class Own(EngineConfig):
    """The engine's settings and one more."""

    patience: int = setting(5000, "microseconds of patience", range=Range(10, 10**6), core="max_wait_us")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "EngineConfig", Own)


def patience(*flags: str, env: dict[str, str] | None = None, file: Path | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser, Own)
    [own] = load([Own], vars(parser.parse_args(flags)), env or {}, file)
    found: int = own.patience
    return found


def test_its_field_is_flag_variable_and_key(tmp_path: Path) -> None:
    file = tmp_path / "dsv4.yaml"
    file.write_text("patience: 20\n")
    env = {"DSV4_PATIENCE": "30"}
    assert patience() == 5000 and patience(file=file) == 20 and patience(env=env, file=file) == 30
    assert patience("--patience", "4k", env=env, file=file) == 4000
    parser = argparse.ArgumentParser()
    add_flags(parser, Own)
    assert "microseconds of patience" in parser.format_help()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"DSV4_PATIENCE": "5"}, "DSV4_PATIENCE: patience is 5; .*10"),
        ({"DSV4_PATIENCE": "soon"}, "patience is 'soon'"),
        ({"DSV4_PATIENC": "50"}, "did you mean 'patience'"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(env: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        patience(env=env)


def test_the_core_gets_it() -> None:
    options = core_options(Own(patience=77)) | {"pages": 64, "max_len": 1024, "max_step_tokens": 512}
    assert json.loads(_core.Core(v4_layout([0, 4, 128]), options).dump())["options"]["max_wait_us"] == 77
