"""How a model's makers want it sampled and where its answers end: generation_config.json and the files of the tokenizer.

As in vLLM: `generation_config.json` gives the defaults of what a request does not say (temperature, top_p, top_k, min_p,
repetition_penalty, max_new_tokens); `--generation-config` names another file or turns it off, `--override-generation-config`
comes first. The ids that end an answer are always taken together from all places that name some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig, token_ids
from dsv4.model.json_fields import Fields, read_json
from dsv4.sampling import SamplingParams
from dsv4.spelling import nearest

FILE = "generation_config.json"
OFF = ("none", "vllm")
"""Values of `--generation-config` that leave the defaults of a request alone; the second is vLLM's word."""

DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""What is read of generation_config.json, and its name in `SamplingParams`."""

FindToken = Callable[[str], int | None]
"""The id of a token by its text, if the tokenizer has it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Defaults of requests, as fields of `SamplingParams`, and the ids that end an answer, each with where it is from."""

    sampling: Mapping[str, Any]
    sampling_from: str
    eos_ids: tuple[int, ...]
    eos_from: str

    def params(self, **given: Any) -> SamplingParams:
        """Parameters in which `given` comes first. A default of max_tokens stays open here: it is a limit that is cut to what
        the context holds when a request is admitted. Raises ValueError."""
        limit = {"max_tokens": None} if "max_tokens" in self.sampling else {}
        return SamplingParams(**{**self.sampling, **limit, **given})

    def describe(self) -> list[str]:
        """For start-up, one line each."""
        values = ", ".join(f"{name} {value:g}" for name, value in self.sampling.items())
        line = f"sampling   {values or 'the defaults of the API'}, where a request says nothing ({self.sampling_from})"
        if self.eos_ids:
            return [
                line,
                f"end        token {' or '.join(map(str, self.eos_ids))} ends an answer ({self.eos_from})",
            ]
        return [line, f"end        {NO_END}"]


def read_generation(
    path: Path,
    config: ModelConfig,
    *,
    setting: str = "auto",
    override: Mapping[str, Any] | None = None,
    find_token: FindToken = lambda text: None,
) -> Generation:
    """Of a model directory. `setting`: `auto` takes the directory's file, one of OFF none, else a file or a directory that
    has one. Raises ConfigError naming the file and field."""
    own = _read(path / FILE)
    if setting in OFF:
        chosen, source = {}, f"generation_config is {setting!r}"
    elif setting == "auto":
        chosen, source = own or {}, FILE if own is not None else f"there is no {FILE}"
    else:
        chosen, source = _elsewhere(setting), setting
    sampling = _defaults(chosen, source)
    if override:
        unknown = next((name for name in override if name not in DEFAULTS), None)
        if unknown is not None:
            raise ConfigError(
                f"override_generation_config has {unknown!r}; it takes {', '.join(DEFAULTS)}{nearest(unknown, DEFAULTS)}"
            )
        sampling |= _defaults(override, "override_generation_config")
        source += ", override_generation_config first"
    return Generation(sampling, source, *_ends(path, config, own or {}, find_token))


def _read(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


def _elsewhere(setting: str) -> dict[str, Any]:
    """The file that a setting names, itself or by its directory."""
    file = Path(setting) / FILE if Path(setting).is_dir() else Path(setting)
    found = _read(file)
    if found is None:
        raise ConfigError(
            f"generation_config is {setting!r}; it takes auto, none, or a file (or a directory with {FILE})"
        )
    return found


def _defaults(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of DEFAULTS under the names of `SamplingParams`, within its limits; null counts as absent."""
    found = {ours: raw[theirs] for theirs, ours in DEFAULTS.items() if raw.get(theirs) is not None}
    if isinstance(found.get("top_k"), float) and found["top_k"].is_integer():
        found["top_k"] = int(found["top_k"])
    try:
        SamplingParams(**{"max_tokens": None, **found})
    except ValueError as e:
        theirs = {ours: theirs for theirs, ours in DEFAULTS.items()}
        name, _, rest = str(e).partition(" ")
        raise ConfigError(f"{source}: {theirs.get(name, name)} {rest}") from None
    if found.get("max_tokens") == 0:
        raise ConfigError(f"{source}: max_new_tokens is 0; the smallest valid value is 1")
    return found


def _ends(
    path: Path, config: ModelConfig, own: Mapping[str, Any], find_token: FindToken
) -> tuple[tuple[int, ...], str]:
    """(ids, where they are from): all of config.json and generation_config.json, else that of the tokenizer's files."""
    more = token_ids(Fields(own, FILE), "eos_token_id", config.vocab_size)
    found = {"config.json": config.eos_ids, FILE: tuple(i for i in more if i not in config.eos_ids)}
    if any(found.values()):
        ids = tuple(i for ids in found.values() for i in ids)
        return tuple(dict.fromkeys(ids)), " and ".join(name for name, ids in found.items() if ids)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = (_read(path / name) or {}).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = find_token(token) if isinstance(token, str) else None
        if number is not None:
            return (number,), f"{token} of {name}; config.json and {FILE} name none"
    number = find_token(END_OF_TURN)
    if number is not None:
        return (number,), f"{END_OF_TURN} of the tokenizer; config.json and {FILE} name none"
    return (), ""


NO_END = "no file names an eos_token_id, so answers run to the end of the context unless max_tokens or stop ends them"
END_OF_TURN = "<｜end▁of▁sentence｜>"
"""What DeepSeek-V4's prompts end each answer with."""
