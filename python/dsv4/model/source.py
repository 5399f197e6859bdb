"""Where a model is: a directory, or a repository's snapshot in the local cache of the Hugging Face hub. Nothing is ever
downloaded. What is not there, or not whole, is one line at once, before torch is imported.

The cache's layout is a public one (hub documentation, "Hub Local Cache"): `models--ORG--NAME/` with `refs/BRANCH` (a file
that holds a commit), `snapshots/COMMIT/` (links) and `blobs/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.json_fields import read_json
from dsv4.model.quantization import INSTEAD
from dsv4.spelling import nearest

RELEASED = {
    "v4-flash": "deepseek-ai/DeepSeek-V4-Flash-0731",
    "v4-flash-preview": "deepseek-ai/DeepSeek-V4-Flash",
    "v4-pro": "deepseek-ai/DeepSeek-V4-Pro-0813",
    "v4-pro-preview": "deepseek-ai/DeepSeek-V4-Pro",
}
"""Configs that ship, by name, and the repositories that they are of."""

INDEX = "model.safetensors.index.json"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec", 1024
_OTHERS = {
    ".gguf": "GGUF, which llama.cpp reads",
    ".bin": "pickles of PyTorch, which are never opened",
    ".pt": "pickles of PyTorch, which are never opened",
    ".pth": "pickles of PyTorch, which are never opened",
}
"""Other formats of weights, by the ends of their files."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model's directory, and the name that it is served under."""

    path: Path
    name: str

    @property
    def repository(self) -> str | None:
        """`org/name`, if the directory is a snapshot of the hub's cache."""
        return _repository_of(self.path)


def find_source(model: str | None, revision: str | None = None, *, weights: bool | None = True) -> Source:
    """Of MODEL as users write it; None is the small model that ships. A directory comes before a repository of that name.
    Without `weights` (False) there may be none, but not a part of them; None: they are not looked at.

    Raises ConfigError where there is nothing, CheckpointError where files are missing or are not what they should be.
    """
    if model is None:
        model = str(resources.files("dsv4") / "data" / "nano")
    if not model.strip():
        raise ConfigError(
            "model is empty; give a directory or org/name, or leave it out for the small one that ships"
        )
    try:
        path = _directory(model, revision)
        source = Source(path, model_name(path))
        if weights is not None:
            _check_whole(source, weights=weights)
    except OSError as e:
        raise ConfigError(f"model is {model!r:.80}: {e.strerror}: {e.filename!s:.200}") from None
    return source


def _directory(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if not path.is_dir():
        _refuse_file(model, path)
        return _cached(model, revision)
    if path.name.startswith("models--") and (path / "snapshots").is_dir():
        return _snapshot(path, revision)
    if revision is not None:
        raise ConfigError(
            f"revision is {revision!r}, but model is the directory {str(path)!r}; it chooses a snapshot of org/name only"
        )
    return path


def model_name(path: Path) -> str:
    """`org/name` of a snapshot in the hub's cache, else the directory's own name."""
    return _repository_of(path) or Path(os.path.abspath(path)).name


def has_weights(path: Path) -> bool:
    """Whether there is any file of weights."""
    return any(path.glob("*.safetensors"))


def _repository_of(path: Path) -> str | None:
    for place in (Path(os.path.abspath(path)), path.resolve()):
        folder = place.parent.parent.name
        if place.parent.name == "snapshots" and folder.startswith("models--"):
            return folder.removeprefix("models--").replace("--", "/", 1)
    return None


def _refuse_file(model: str, path: Path) -> None:
    if path.suffix in _OTHERS:
        raise ConfigError(f"model is {model!r}: weights in {_OTHERS[path.suffix]}; {INSTEAD}")
    if path.is_file():
        raise ConfigError(
            f"model is {model!r}, a file; give the directory that it is in: {str(path.parent)!r}"
        )


def _cached(model: str, revision: str | None) -> Path:
    """The snapshot of a repository. Raises ConfigError for what is neither in the cache nor anything else."""
    if model in RELEASED:
        raise ConfigError(
            f"model is {model!r}, a config for dsv4 plan and dsv4 simulate that has no weights; they are {RELEASED[model]}: "
            f"`hf download {RELEASED[model]}`"
        )
    if not _REPOSITORY.fullmatch(model):
        named = _REPOSITORY.search(model.partition("://")[2].partition("/")[2])
        raise ConfigError(
            f"model is {model!r}; it must be a directory with config.json and safetensors files, or org/name of the hub"
            f"{f'; did you mean {named[0]!r}?' if named else ''}"
        )
    caches = cache_directories()
    folder = f"models--{model.replace('/', '--')}"
    found = next((cache / folder for cache in caches if (cache / folder / "snapshots").is_dir()), None)
    if found is not None:
        return _snapshot(found, revision)
    there = [name for cache in caches for name in _repositories(cache)]
    shipped = next((ours for ours, theirs in RELEASED.items() if theirs == model), None)
    hint = f" (its config ships as {shipped!r}, for dsv4 plan)" if shipped else nearest(model, there)
    looked = " and ".join(map(str, caches))
    raise ConfigError(
        f"model {model!r} is no directory and not in the local hub cache ({looked}); dsv4 downloads nothing, get it with "
        f"`hf download {model}`{hint}"
    )


def cache_directories() -> list[Path]:
    """Where the hub's libraries keep repositories: the first of their variables that is set, else ~/.cache, and the older
    TRANSFORMERS_CACHE."""
    env = {name: value for name, value in os.environ.items() if value}
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    places = [hub, env.get("TRANSFORMERS_CACHE")]
    return list(dict.fromkeys(Path(os.path.expandvars(p)).expanduser() for p in places if p))


def _repositories(cache: Path) -> Iterable[str]:
    folders = sorted(cache.glob("models--*--*"))
    return [f.name.removeprefix("models--").replace("--", "/", 1) for f in folders]


def _snapshot(folder: Path, revision: str | None) -> Path:
    """By branch, tag or commit (its beginning does); without one `main`, or the newest that there is."""
    snapshots = folder / "snapshots"
    there = sorted((p for p in snapshots.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    name = folder.name.removeprefix("models--").replace("--", "/", 1)
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    matching = [
        p for p in there if commit and (p.name == commit or (len(commit) >= 7 and p.name.startswith(commit)))
    ]
    if len(matching) == 1:
        return matching[0]
    if revision is not None:
        known = [str(p.relative_to(folder / "refs")) for p in (folder / "refs").rglob("*") if p.is_file()]
        raise ConfigError(
            f"revision {revision!r} of {name} is not in the local hub cache ({folder}), which has "
            f"{', '.join([*sorted(known), *(p.name[:12] for p in there)]) or 'none'}; get it with "
            f"`hf download {name} --revision {revision}`"
        )
    if not there:
        raise ConfigError(f"{folder} holds no snapshot; get it with `hf download {name}`")
    return there[-1]


def _check_whole(source: Source, *, weights: bool) -> None:
    """Raises CheckpointError for shards that are missing, dangling links and pointers of git-lfs, and for a directory that
    has its weights in another format."""
    path = source.path
    files = [f for f in path.iterdir() if f.suffix in (".safetensors", ".json")]
    files += [*path.glob("encoding_*.py"), *path.glob("encoding/*.py")]  # by which the chat format is chosen
    again = (
        f"finish it with `hf download {source.repository}`"
        if source.repository
        else "finish the download or the copy"
    )
    dangling = sorted(f.name for f in files if not f.exists())
    if dangling:
        raise CheckpointError(
            f"{path} is incomplete: {_some(dangling)} links to a file that is not there{_unfinished(source)}; {again}"
        )
    pointers = sorted(f.name for f in files if _is_pointer(f))
    if pointers:
        raise CheckpointError(
            f"{path} holds pointers of git-lfs in place of files ({_some(pointers)}); run `git lfs pull` there"
        )
    if not (path / "config.json").exists():
        raise ConfigError(f"{path / 'config.json'}: No such file or directory")
    shards = {f.name for f in files if f.suffix == ".safetensors"}
    if not shards and not weights:
        return
    wanted = _named(path) if (path / INDEX).exists() else _numbered(shards)
    missing = sorted(wanted - shards)
    if missing:
        raise CheckpointError(
            f"{path} is incomplete: {len(missing)} of {len(wanted)} shards are missing, {_some(missing)}{_unfinished(source)}; "
            f"{again}"
        )
    if not shards:
        other = next((f for f in sorted(path.iterdir()) if f.suffix in _OTHERS), None)
        if other is not None:
            raise CheckpointError(
                f"{path} has its weights in {_OTHERS[other.suffix]} ({other.name}); {INSTEAD}"
            )
        raise CheckpointError(f"{path} has no .safetensors files; {again}")


def _named(path: Path) -> set[str]:
    """Shards that the index names; one that cannot be read is left to the loader, which says what is wrong with it."""
    try:
        weight_map = read_json(path / INDEX).get("weight_map")
    except ConfigError:
        return set()
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return {n for n in names if Path(n).name == n and n.endswith(".safetensors")}


def _numbered(shards: set[str]) -> set[str]:
    """`model-00001-of-00048.safetensors` and its siblings, where there is one of them."""
    found = [m for m in map(_NUMBERED.fullmatch, shards) if m]
    return {f"{m[1]}-{n:05}-of-{m[3]}.safetensors" for m in found for n in range(1, int(m[3]) + 1)}


def _is_pointer(file: Path) -> bool:
    if file.stat().st_size > _POINTER_BYTES:
        return False
    with file.open("rb") as f:
        return f.read(len(_POINTER)) == _POINTER


def _unfinished(source: Source) -> str:
    """`; 2 files of a download are unfinished`, from what the hub's tools leave beside the blobs."""
    blobs = (
        source.path.parent.parent / "blobs"
        if source.repository
        else source.path / ".cache/huggingface/download"
    )
    count = sum(1 for _ in blobs.glob("*.incomplete"))
    return f" ({count} unfinished file{'s' if count > 1 else ''} in {blobs})" if count else ""


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
