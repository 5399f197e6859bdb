"""Which release's texts a model directory gets, and what says so."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.text.chat_format import GA, PREVIEW, choose_format

WITH_DRAFT = ModelConfig.preset("v4-flash")
WITHOUT = ModelConfig.preset("v4-pro-preview")
NEW = '"""Prompts."""\nREASONING_EFFORT_PROMPTS: Dict[str, str] = {"low": "", "high": "a", "max": "b"}\n'
OLD = '"""Prompts. Not REASONING_EFFORT_PROMPTS."""\nREASONING_EFFORT_MAX = (\n    "a"\n)\n'


def encoder(path: Path, text: str, name: str = "encoding/encoding_dsv4.py") -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(text)


def test_the_config_decides_where_there_is_no_encoder(tmp_path: Path) -> None:
    format, why = choose_format(tmp_path, WITH_DRAFT)
    assert format is GA and "since 0731" in why and "DSpark draft layers" in why
    format, why = choose_format(tmp_path, WITHOUT)
    assert format is PREVIEW and "the preview's" in why and "no encoding/encoding_dsv4.py" in why
    assert choose_format("/nowhere", WITH_DRAFT)[0] is GA


@pytest.mark.parametrize("config", [WITH_DRAFT, WITHOUT])
@pytest.mark.parametrize("name", ["encoding/encoding_dsv4.py", "encoding_dsv4.py"])
def test_the_encoder_in_the_directory_decides(tmp_path: Path, config: ModelConfig, name: str) -> None:
    """A re-upload may have lost its draft layers; the encoder still tells what it was trained with."""
    encoder(tmp_path, NEW, name)
    format, why = choose_format(tmp_path, config)
    assert format is GA and name in why
    encoder(tmp_path, OLD, name)
    format, why = choose_format(tmp_path, config)
    assert format is PREVIEW and name in why


@pytest.mark.parametrize("text", ["", "x = 1\n", "# REASONING_EFFORT_PROMPTS\n", "\x00\xff" * 10])
def test_an_encoder_that_says_nothing_leaves_it_to_the_config(tmp_path: Path, text: str) -> None:
    encoder(tmp_path, text)
    assert choose_format(tmp_path, WITH_DRAFT)[0] is GA
    assert choose_format(tmp_path, WITHOUT)[0] is PREVIEW


def test_the_encoder_is_never_run(tmp_path: Path) -> None:
    encoder(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')\n{NEW}raise SystemExit(3)\n")
    assert choose_format(tmp_path, WITHOUT)[0] is GA
    assert not (tmp_path / "ran").exists()


def test_single_texts_are_replaced_on_top(tmp_path: Path) -> None:
    (tmp_path / "chat_format.json").write_text(json.dumps({"tools_before": "T"}))
    encoder(tmp_path, NEW)
    format, why = choose_format(tmp_path, WITHOUT)
    assert format == dataclasses.replace(GA, tools_before="T")
    assert why.startswith("chat_format.json of the model, on top of that of the releases since 0731")


def test_the_small_model_says_what_it_has() -> None:
    path = resources.files("dsv4") / "data" / "nano"
    _, why = choose_format(str(path), ModelConfig.from_dir(str(path)))
    assert why.startswith("chat_format.json of the model")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"tools_befor": ""}, "has the key 'tools_befor'; known are efforts, tools_before"),
        ({"tools_before": 3}, "has tools_before = 3"),
        ({"efforts": {"high": ""}}, "has efforts without 'low'"),
        ({"efforts": {"low": 1}}, "has efforts without 'low', or whose prefixes are no texts"),
    ],
)
def test_a_bad_chat_format_is_one_line(tmp_path: Path, raw: dict, words: str) -> None:
    (tmp_path / "chat_format.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as e:
        choose_format(tmp_path, WITH_DRAFT)
    assert words in str(e.value) and "\n" not in str(e.value)
