"""Defaults of sampling and ends of answers, out of the files that a model directory has."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM
from dsv4.config import EngineConfig, load
from dsv4.errors import ConfigError
from dsv4.model.generation_config import read_generation
from dsv4.sampling import SamplingParams

from tests.support.checkpoints import set_config, write_random
from tests.support.models import random_config

RELEASED = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "5.0.0",
}


def read(path: Path, raw: dict[str, Any] | None, eos: Any = 1, **how: Any) -> Any:
    if raw is not None:
        (path / "generation_config.json").write_text(json.dumps(raw))
    return read_generation(path, random_config(eos_token_id=eos), **how)


def test_the_file_of_the_model_gives_the_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, {**RELEASED, "top_k": 50.0, "min_p": None, "max_new_tokens": 100})
    assert found.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "max_tokens": 100}
    assert found.describe() == [
        "sampling   temperature 0.6, top_p 0.95, top_k 50, max_tokens 100, where a request says nothing "
        "(generation_config.json)",
        "end        token 1 ends an answer (config.json)",
    ]
    assert found.params() == SamplingParams(temperature=0.6, top_p=0.95, top_k=50, max_tokens=None)
    assert found.params(temperature=0, max_tokens=5) == SamplingParams(
        temperature=0, top_p=0.95, top_k=50, max_tokens=5
    )


def test_there_may_be_no_such_file(tmp_path: Path) -> None:
    found = read(tmp_path, None)
    assert found.sampling == {} and found.params() == SamplingParams()
    assert found.describe()[0] == (
        "sampling   the defaults of the API, where a request says nothing (there is no generation_config.json)"
    )


@pytest.mark.parametrize("word", ["none", "vllm"])
def test_it_can_be_turned_off_but_for_the_end_of_answers(tmp_path: Path, word: str) -> None:
    found = read(tmp_path, {**RELEASED, "eos_token_id": [1, 7]}, setting=word)
    assert (found.sampling, found.eos_ids) == ({}, (1, 7))
    assert f"(generation_config is '{word}')" in found.describe()[0]


def test_another_file_or_directory_is_taken_and_the_override_comes_first(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for place in (tmp_path / "own" / "generation_config.json", tmp_path / "mine.json"):
        place.write_text('{"temperature": 0.3, "top_k": 5, "eos_token_id": 9}')
    for setting in (tmp_path / "own", tmp_path / "mine.json"):
        found = read(tmp_path, RELEASED, setting=str(setting), override={"top_k": 3, "min_p": 0.1})
        assert found.sampling == {"temperature": 0.3, "top_k": 3, "min_p": 0.1}
        assert found.eos_ids == (1,)
        assert f"({setting}, override_generation_config first)" in found.describe()[0]


@pytest.mark.parametrize(
    ("eos", "more", "ids", "source"),
    [
        (1, 1, (1,), "config.json"),
        (1, None, (1,), "config.json"),
        (1, [1, 5], (1, 5), "config.json and generation_config.json"),
        ([1, 2], 3, (1, 2, 3), "config.json and generation_config.json"),
        (None, 7, (7,), "generation_config.json"),
        (None, [7, 8], (7, 8), "generation_config.json"),
    ],
)
def test_ends_of_answers_are_taken_together(
    tmp_path: Path, eos: Any, more: Any, ids: tuple[int, ...], source: str
) -> None:
    found = read(tmp_path, {"eos_token_id": more}, eos)
    assert (found.eos_ids, found.eos_from) == (ids, source)


@pytest.mark.parametrize("token", ["<end>", {"content": "<end>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_files_of_the_tokenizer_name_the_end_where_the_configs_do_not(
    tmp_path: Path, token: Any, name: str
) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token": token}))
    found = read(tmp_path, None, None, find_token={"<end>": 12}.get)
    assert (found.eos_ids, found.eos_from) == (
        (12,),
        f"<end> of {name}; config.json and generation_config.json name none",
    )
    assert read(tmp_path, {"eos_token_id": 3}, None, find_token={"<end>": 12}.get).eos_ids == (3,)


def test_the_end_of_deepseeks_turns_is_the_last_resort_and_then_there_is_a_warning(tmp_path: Path) -> None:
    found = read(tmp_path, None, None, find_token={"<｜end▁of▁sentence｜>": 1}.get)
    assert found.eos_ids == (1,) and "of the tokenizer" in found.eos_from
    (line,) = read(tmp_path, None, None).describe()[1:]
    assert "eos_token_id" in line and "answers run to the end of the context" in line


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"temperature": -1}, "generation_config.json: temperature is -1; it must be from 0 to 2"),
        ({"temperature": "hot"}, "generation_config.json: temperature is 'hot'; it must be a number"),
        ({"top_k": 1.5}, "generation_config.json: top_k is 1.5; it must be a whole number"),
        ({"max_new_tokens": -5}, "generation_config.json: max_new_tokens is -5"),
        ({"max_new_tokens": 0}, "generation_config.json: max_new_tokens is 0; the smallest valid value is 1"),
        (
            {"eos_token_id": 4096},
            "generation_config.json.eos_token_id is 4096; .* below the vocabulary's 256",
        ),
        (
            {"eos_token_id": "</s>"},
            'generation_config.json.eos_token_id is "</s>"; it must be a whole number',
        ),
    ],
)
def test_wrong_values_are_one_line(tmp_path: Path, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        read(tmp_path, raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"setting": "/no/such"}, "generation_config is '/no/such'; it takes auto, none, or a file"),
        (
            {"override": {"temprature": 1}},
            "override_generation_config has 'temprature'; .*mean 'temperature'",
        ),
        ({"override": {"top_p": 7}}, "override_generation_config: top_p is 7"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, None, **how)


def test_the_override_is_json_as_a_flag_and_a_mapping_in_yaml(tmp_path: Path) -> None:
    def config(**how: Any) -> EngineConfig:
        return load([EngineConfig], env={}, **how)[0]

    file = tmp_path / "s.yaml"
    file.write_text("override_generation_config:\n  temperature: 0.5\n  top_k: 4\ngeneration_config: none\n")
    assert config(yaml_path=file).override_generation_config == {"temperature": 0.5, "top_k": 4}
    assert config(yaml_path=file).generation_config == "none"
    assert config(flags={"override_generation_config": '{"top_k": 4}'}).override_generation_config == {
        "top_k": 4
    }
    for wrong, said in (("{", "which is no JSON"), ("[1]", "it takes a JSON object")):
        with pytest.raises(ConfigError, match=f"override_generation_config is .*{said}"):
            config(flags={"override_generation_config": wrong})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_random(tmp_path_factory.mktemp("tiny"), compress_ratios=[0, 4])
    set_config(path, eos_token_id=None)
    return path


SMALL = {"device": "cpu", "num_pages": 8, "block_size": 128}


def test_llm_takes_the_defaults_and_a_request_comes_first(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = list(range(5, 40))
    plain = LLM(str(tiny), **SMALL)
    assert [r.levelname for r in caplog.records if "no file names an eos_token_id" in r.message] == [
        "WARNING"
    ]
    assert "answers run to the end of the context" in "\n".join(plain.describe())
    greedy = plain.generate([prompt], SamplingParams(temperature=0, max_tokens=20))[0].token_ids
    assert len(greedy) == 20
    file = tiny / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 6, "eos_token_id": [9, greedy[3]]}))
    llm = LLM(str(tiny), **SMALL)
    assert llm.get_default_sampling_params().temperature == 0
    end = greedy.index(greedy[3])
    assert llm.generate([prompt])[0].token_ids == greedy[: end + 1]
    assert [out for step in llm.stream(prompt) for out in step.token_ids] == greedy[: end + 1]
    ignoring = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    assert llm.generate([prompt], ignoring)[0].token_ids == greedy[:9]
    off = LLM(str(tiny), generation_config="none", override_generation_config={"max_new_tokens": 2}, **SMALL)
    assert off.get_default_sampling_params() == SamplingParams(max_tokens=None)
    assert off.generate([prompt], SamplingParams(temperature=0, max_tokens=None))[0].token_ids == greedy[:2]
    file.unlink()


def test_without_an_id_in_the_config_the_model_that_ships_ends_its_answers(tmp_path: Path) -> None:
    nano = Path(str(resources.files("dsv4"))) / "data" / "nano"
    for file in nano.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    raw = json.loads((nano / "config.json").read_text())
    del raw["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    llm = LLM(str(tmp_path), **SMALL)
    params = SamplingParams(temperature=0, max_tokens=100, skip_special_tokens=False)
    done = llm.chat([{"role": "user", "content": "Who are you?"}], params)
    assert done.finish_reason == "stop" and "end▁of▁sentence" not in done.text
