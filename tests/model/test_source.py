"""Finding a model: directories, the local hub cache, and one line at once for what is not there or not whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM
from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.source import cache_directories, find_source, model_name

from tests.support.checkpoints import write_hub, write_release

REPOSITORY = "deepseek-ai/DeepSeek-V4-Tiny"
OLD, NEW = "a" * 40, "b" * 40
VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "TRANSFORMERS_CACHE",
    "XDG_CACHE_HOME",
    "HOME",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("files"), shards=3, compress_ratios=[0, 4])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home without any of the hub's variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("variables", "looked"),
    [
        ({}, ["HOME/.cache/huggingface/hub"]),
        ({"XDG_CACHE_HOME": "/x"}, ["/x/huggingface/hub"]),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, ["/h/hub"]),
        ({"HF_HOME": "~/h"}, ["HOME/h/hub"]),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, ["/c"]),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, ["/old"]),
        ({"HF_HUB_CACHE": "$XDG_CACHE_HOME/c", "XDG_CACHE_HOME": "/x"}, ["/x/c"]),
        ({"TRANSFORMERS_CACHE": "/t"}, ["HOME/.cache/huggingface/hub", "/t"]),
        ({"HF_HOME": ""}, ["HOME/.cache/huggingface/hub"]),
    ],
)
def test_the_cache_is_where_the_hubs_libraries_have_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], looked: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [str(p) for p in cache_directories()] == [p.replace("HOME", str(home)) for p in looked]


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "TRANSFORMERS_CACHE", None])
def test_a_repository_is_found_under_its_name(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    cache = home / ".cache" / "huggingface" / "hub" if variable is None else home / "cache"
    if variable is not None:
        monkeypatch.setenv(variable, str(cache))
    folder = write_hub(cache, REPOSITORY, {OLD: files}, main=OLD)
    source = find_source(REPOSITORY)
    assert (source.path, source.name) == (folder / "snapshots" / OLD, REPOSITORY)
    config, path = ModelConfig.find(REPOSITORY)
    assert (config.name, path) == (REPOSITORY, source.path)
    (first, *_) = LLM(REPOSITORY, device="cpu", num_pages=8, block_size=128).describe()
    assert first.startswith(f"model      {REPOSITORY}: ") and f"from {source.path}" in first


def test_a_snapshot_is_served_under_its_repositorys_name_however_it_is_given(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hub(home / "cache", REPOSITORY, {OLD: files})
    snapshot = folder / "snapshots" / OLD
    for given in (snapshot, f"{snapshot}/", folder, snapshot / ".." / OLD):
        assert find_source(str(given)).name == REPOSITORY, given
    monkeypatch.chdir(snapshot)
    assert find_source(".").name == REPOSITORY
    (home / "link").symlink_to(snapshot)
    assert model_name(home / "link") == REPOSITORY
    assert model_name(files) == files.name
    assert find_source(None).name == "nano"


def test_revisions(files: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(home))
    folder = write_hub(home / "hub", REPOSITORY, {OLD: files, NEW: files}, main=OLD)
    (folder / "refs" / "pr").mkdir()
    (folder / "refs" / "pr" / "7").write_text(f"{NEW}\n")
    os.utime(folder / "snapshots" / OLD, (1, 1))

    def commit(revision: str | None = None) -> str:
        return find_source(REPOSITORY, revision).path.name

    assert (commit(), commit("main"), commit("pr/7"), commit(NEW), commit("b" * 7)) == (
        OLD,
        OLD,
        NEW,
        NEW,
        NEW,
    )
    with pytest.raises(ConfigError) as error:
        commit("v2")
    assert str(error.value) == (
        f"revision 'v2' of {REPOSITORY} is not in the local hub cache ({folder}), which has main, pr/7, {OLD[:12]}, "
        f"{NEW[:12]}; get it with `hf download {REPOSITORY} --revision v2`"
    )
    (folder / "refs" / "main").unlink()
    assert commit() == NEW  # the newest
    (folder / "refs" / "main").write_text("c" * 40)  # a snapshot that is gone
    assert commit() == NEW
    with pytest.raises(ConfigError, match=r"revision is 'main', but model is the directory .*org/name only"):
        find_source(str(files), "main")


def test_a_directory_of_that_name_comes_first(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(home))
    write_hub(home / "hub", REPOSITORY, {OLD: files}, main=OLD)
    shutil.copytree(files, Path(REPOSITORY))
    assert find_source(REPOSITORY).path == Path(REPOSITORY)
    assert find_source(REPOSITORY).name == "DeepSeek-V4-Tiny"


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "plan"])
def test_what_is_not_there_is_one_line_before_torch_is_imported(home: Path, command: str) -> None:
    arguments = {
        "serve": [REPOSITORY],
        "generate": ["--model", REPOSITORY, "hello"],
        "chat": [REPOSITORY],
        "plan": [REPOSITORY, "--gpu", "h100"],
    }[command]
    code = (
        "import sys; from dsv4.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, command, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr == (
        f"dsv4: error: model {REPOSITORY!r} is no directory and not in the local hub cache "
        f"({home}/.cache/huggingface/hub); dsv4 downloads nothing, get it with `hf download {REPOSITORY}`\n"
    )


def test_a_repository_that_is_there_is_suggested(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(home))
    write_hub(home / "hub", REPOSITORY, {OLD: files})
    with pytest.raises(ConfigError, match=f"did you mean '{REPOSITORY}'"):
        find_source("deepseek-ai/DeepSeek-V4-Tni")
    with pytest.raises(ConfigError, match="its config ships as 'v4-flash', for dsv4 plan"):
        ModelConfig.find("deepseek-ai/DeepSeek-V4-Flash-0731")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "v4-flash",
            r"model is 'v4-flash', a config for dsv4 plan .*`hf download deepseek-ai/DeepSeek-V4-Flash-0731`",
        ),
        ("/no/such", "model is '/no/such'; it must be a directory with config.json"),
        ("./no", "model is './no'; it must be a directory"),
        ("", "model is empty; give a directory or org/name"),
        ("x" * 300, "model is 'xxx.*File name too long"),
        ("nowhere", "model is 'nowhere'; it must be a directory .* or org/name of the hub"),
        (
            "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash/tree/main",
            "mean 'deepseek-ai/DeepSeek-V4-Flash'",
        ),
        ("a/b/c", "model is 'a/b/c'; it must be a directory"),
        (
            "x.gguf",
            r"model is 'x.gguf': weights in GGUF, which llama.cpp reads; take the weights that DeepSeek",
        ),
        ("org/x-Q4.gguf", "weights in GGUF"),
        ("w.safetensors", "model is 'w.safetensors', a file; give the directory that it is in: '.'"),
    ],
)
def test_what_is_no_model_is_one_line(model: str, said: str) -> None:
    Path("w.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=said) as error:
        find_source(model)
    assert "\n" not in str(error.value)


def pointer(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3583000000\n")


def only(path: Path, name: str) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / name).write_bytes(b"x")


SECOND = "model-00002-of-00003.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (
        lambda p: (p / SECOND).unlink(),
        f"is incomplete: 1 of 3 shards are missing, {SECOND}; finish",
    ),
    "no shards": (
        lambda p: [f.unlink() for f in p.glob("*.safetensors")],
        "3 of 3 shards are missing, model-00001-of-00003.safetensors and 2 more",
    ),
    "a missing shard and no index": (
        lambda p: [(p / SECOND).unlink(), (p / "model.safetensors.index.json").unlink()],
        f"is incomplete: 1 of 3 shards are missing, {SECOND}; finish",
    ),
    "a dangling link": (
        lambda p: [(p / SECOND).unlink(), (p / SECOND).symlink_to("../../blobs/gone")],
        f"is incomplete: {SECOND} links to a file that is not there; finish",
    ),
    "a dangling config": (
        lambda p: [(p / "config.json").unlink(), (p / "config.json").symlink_to("gone")],
        "is incomplete: config.json links to a file that is not there",
    ),
    "a pointer": (
        lambda p: pointer(p / SECOND),
        f"holds pointers of git-lfs in place of files .{SECOND}.; run `git lfs pull` there",
    ),
    "a pointer in place of the tokenizer": (
        lambda p: pointer(p / "tokenizer.json"),
        "holds pointers of git-lfs in place of files .tokenizer.json.",
    ),
    "a pointer in place of the encoder": (
        lambda p: [(p / "encoding").mkdir(), pointer(p / "encoding" / "encoding_dsv4.py")],
        "holds pointers of git-lfs in place of files .encoding_dsv4.py.",
    ),
    "an unfinished download": (
        lambda p: [
            (p / SECOND).unlink(),
            (p / ".cache/huggingface/download").mkdir(parents=True),
            (p / ".cache/huggingface/download/x.incomplete").write_bytes(b""),
        ],
        r"1 of 3 shards are missing, .* \(1 unfinished file in .*download\); finish the download or the copy",
    ),
    "GGUF alone": (
        lambda p: only(p, "x-Q4_K_M.gguf"),
        r"has its weights in GGUF, which llama.cpp reads \(x-Q4_K_M.gguf\); take",
    ),
    "pickles alone": (
        lambda p: only(p, "pytorch_model.bin"),
        r"has its weights in pickles of PyTorch, which are never opened \(pytorch_model.bin\)",
    ),
    "no weights": (
        lambda p: [f.unlink() for f in p.glob("*.safetensors*")],
        "has no .safetensors files",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_one_line(files: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m"
    shutil.copytree(files, path)
    spoil, said = BROKEN[name]
    spoil(path)
    with pytest.raises(CheckpointError, match=said) as error:
        find_source(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(CheckpointError, match=re.escape(str(error.value))):
        LLM(str(path))


def test_an_unfinished_download_into_the_cache_says_how_to_go_on(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(home))
    folder = write_hub(home / "hub", REPOSITORY, {OLD: files}, main=OLD)
    (folder / "snapshots" / OLD / SECOND).unlink()
    for n in range(2):
        (folder / "blobs" / f"{n}.incomplete").write_bytes(b"x")
    said = (
        f"1 of 3 shards are missing, {SECOND} (2 unfinished files in {folder}/blobs); finish it with "
        f"`hf download {REPOSITORY}`"
    )
    for find in (lambda: find_source(REPOSITORY), lambda: ModelConfig.find(REPOSITORY)):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            find()
    shutil.rmtree(folder / "snapshots" / OLD)
    with pytest.raises(ConfigError, match=f"holds no snapshot; get it with `hf download {REPOSITORY}`"):
        find_source(REPOSITORY)


def test_a_config_in_the_cache_is_enough_for_a_plan(
    files: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(home))
    folder = write_hub(home / "hub", REPOSITORY, {OLD: files}, main=OLD)
    for file in (folder / "snapshots" / OLD).glob("*.safetensors"):
        file.unlink()
    assert ModelConfig.find(REPOSITORY)[0].name == REPOSITORY
    with pytest.raises(CheckpointError, match="3 of 3 shards are missing"):
        find_source(REPOSITORY)
