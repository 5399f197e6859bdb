"""Every setting of dsv4, and the one place that reads flags, environment, YAML and profiles.

A setting is a field of a frozen dataclass; its metadata (`dsv4.settings`) carries the help text, the choices and the names that vLLM
uses for the same thing. From the field follow the flag (`--max-model-len`), the environment variable
(`DSV4_MAX_MODEL_LEN`), the YAML key and the key of a profile (`max_model_len`). Precedence: flag, environment, YAML file, profile,
default.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dsv4 import profiles
from dsv4.elsewhere import why_not
from dsv4.errors import ConfigError
from dsv4.quantities import SHARE, Range
from dsv4.settings import convert, put_right, read_yaml, setting

ENV_PREFIX = "DSV4_"
LONGEST_NAME = 512
"""Characters of a model's name in the API."""
_COUNT, _SECONDS = Range(1), Range(0, 1e9, open=True, unit="seconds")


def step_budget(step_ms: float | str | None, device: str, sizes: Sequence[int] = ()) -> Any:
    """`--step-ms` as the core's `step_budget`. A GPU reads nearly all experts for 64 tokens as for 512, so prompts get those in any case
    (docs/scheduling.md), or the next lower of `sizes`, tokens of the steps that are captured: another takes longer than one of these."""
    if step_ms == "auto":
        floor = {"cpu": 64, "cuda": 512}[device]
        return {"decodes": {"times": 4.0, "floor": max((n for n in sizes if n <= floor), default=floor)}}
    return "open" if step_ms is None else {"fixed": 1000 * float(step_ms)}


def default_step_tokens(device: str, running: int, ranks: int = 1) -> int:
    """Tokens of a step where none are given. A GPU reads all experts of Flash for 512 tokens as for 4,096, which is the largest step with
    prompts that one GPU has captured as a graph; more take more workspace and are hardly read faster. Ranks read prompts that are dealt out, as
    fast from 4,096 tokens a rank on; 8,192 is the largest that is captured then. While requests decode `step_ms` keeps steps short. Each
    running request needs its token."""
    tokens = {"cpu": 512, "cuda": min(4096 * ranks, 8192)}[device]
    return max(tokens, running)


def step_tokens(config: EngineConfig, device: str, ranks: int) -> int:
    """Tokens of a step, as they are given or by default."""
    return config.max_num_batched_tokens or default_step_tokens(device, config.max_num_seqs, ranks)


def backend_names() -> tuple[str, ...]:
    """`auto` and every backend of the ops that ships. Loads none of them, nor torch."""
    try:  # the GPU kernels ship beside the package and may be left out
        from dsv4.kernels import BACKENDS
    except ImportError:
        return ("auto", "reference")
    return ("auto", *BACKENDS, "reference")


def snapshot_policies() -> tuple[str, ...]:
    """The core's."""
    from dsv4._core import SNAPSHOT_POLICIES

    return SNAPSHOT_POLICIES


def evictions() -> tuple[str, ...]:
    """The core's."""
    from dsv4._core import EVICTIONS

    return EVICTIONS


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine needs to know. `None` and `auto` are resolved at start and printed."""

    model: str | None = setting(
        None,
        "directory with config.json and safetensors, or org/name in the local hub cache (default: the small model that ships)",
    )
    revision: str | None = setting(
        None, "branch, tag or commit of org/name (default: main, or the newest in the cache)"
    )
    load_format: str = setting(
        "auto",
        "where weights come from: auto and safetensors read MODEL's files; dummy makes them up from --seed in the release's "
        "formats, and needs config.json alone",
        choices=("auto", "safetensors", "dummy"),
    )
    num_layers: int | None = setting(
        None, "use only the first layers of the model, to try or measure it (default: all)", range=_COUNT
    )
    generation_config: str = setting(
        "auto",
        "defaults of sampling: auto (generation_config.json of the model), none, or another such file",
    )
    override_generation_config: Mapping[str, Any] | None = setting(
        None,
        """defaults of sampling that come first, as JSON: '{"temperature": 0.6, "top_p": 0.95}'""",
        unit="json",
    )
    tensor_parallel_size: int | None = setting(
        None,
        "ranks that run the model together, a process and on a GPU machine a GPU each (default: the least of 1, 2, 4, 8 that hold "
        "weights, workspace and one request of --max-model-len on the GPUs that there are; 1 on a CPU)",
        aliases=("tp", "tp-size"),
        range=_COUNT,
    )
    rank_timeout: float = setting(
        60.0,
        "seconds after which a rank that does not answer, or that the others wait for, is named and the engine ended",
        range=_SECONDS,
    )
    dtype: str = setting("auto", "dtype of weights and activations", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda"))
    backend: str = setting(
        "auto",
        "kernels of the ops, one or several in order of preference, such as gluon,triton; auto takes the best that runs here, "
        "also for ops that the named ones lack",
        choices=backend_names,
        unit="names",
    )
    profile: str | None = setting(
        None,
        "settings for a kind of traffic, by name or as a TOML file (dsv4 profiles lists them); every other place comes before it",
    )
    deterministic: bool = setting(
        False,
        "a request's tokens and log-probabilities are the same to the bit whatever runs beside it, however its prompt is cut, cached or "
        "resumed; on a GPU by kernels that add in an order of their own, which costs some speed (on a CPU it is always so)",
        aliases=("enable-deterministic-inference",),
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt plus output in tokens (default: the model's, cut to the pool)",
        range=Range(1, such="64k or 1M"),
    )
    max_tokens_overflow: str = setting(
        "cut",
        "what becomes of a max_tokens that does not fit after the prompt: cut to what is left of the context (the answer "
        "then ends with finish_reason length), or refuse the request, as vLLM does",
        choices=("cut", "refuse"),
    )
    max_num_seqs: int = setting(
        16, "requests that run at the same time, one live-state slab each", range=_COUNT, core="slabs"
    )
    max_num_batched_tokens: int | None = setting(
        None,
        "tokens of one step, prefill chunks and decodes together (default: 512 on a CPU, 4096 on a GPU, 8192 on several)",
        range=_COUNT,
        core="max_step_tokens",
    )
    max_num_waiting: int = setting(
        1024, "requests that may wait; further ones are refused with 429", range=_COUNT, core="max_waiting"
    )
    block_size: int | None = setting(
        None,
        "tokens of a history page; a multiple of all compression ratios, 128 in V4 (default: the least such one from 256 on)",
        range=Range(1, such="256"),
    )
    kv_cache_dtype: str = setting(
        "auto", "format of window and compressed rows", choices=("auto", "float32", "bfloat16", "fp8_ds_mla")
    )
    index_cache_dtype: str = setting(
        "auto", "format of index rows", choices=("auto", "float32", "bfloat16", "mxfp4", "fp8")
    )
    kv_cache_memory: int | None = setting(
        None,
        "bytes of the page pool, of each rank where there are several (default: part of what is free)",
        aliases=("kv-cache-memory-bytes",),
        unit="bytes",
        range=Range(1, float("inf")),
    )
    gpu_memory_utilization: float = setting(
        0.9, "share of a GPU's memory to use", aliases=("memory-fraction",), range=SHARE
    )
    num_pages: int | None = setting(None, "exact number of pages instead of --kv-cache-memory", range=_COUNT)
    enable_prefix_caching: bool = setting(
        True, "reuse the history and state of equal prefixes", core="prefix_cache"
    )
    snapshot_policy: str = setting(
        "auto",
        "where state is saved for reuse",
        choices=snapshot_policies,
        aliases=("snapshots",),
        core="snapshots",
    )
    snapshot_budget: float = setting(
        0.1,
        "largest share of the pool that snapshots fill while memory is short, 0 to 1",
        range=Range(0, 1),
        core="snapshot_budget",
    )
    eviction: str = setting(
        "value",
        "by what the cached page that goes first is chosen while memory is short",
        choices=evictions,
        core="eviction",
    )
    cost_model: str | None = setting(
        None,
        "prior costs: token_us=…,context_us_per_1k=…,replay_factor=…,restore_us=…,base_us=…,decode_us=…,copy_us=… "
        "(default: by device; corrected by measured steps)",
    )
    step_ms: float | str | None = setting(
        "auto",
        "milliseconds that a step with running decodes may take; prompts are cut to it. auto: four times as long as the "
        "decodes alone take; none: no limit",
        unit="auto",
        range=Range(0, 1e12, open=True),
    )
    tenants: str | None = setting(
        None,
        "shares of prefill and quotas of the cache: NAME:WEIGHT[:QUOTA],… (others have weight 1 and no quota)",
        aliases=("tenant",),
    )
    max_wait: float = setting(
        30.0, "seconds after which a waiting request goes ahead of all", range=Range(0, 1e9, unit="seconds")
    )
    enforce_eager: bool = setting(False, "on a GPU, launch each step kernel by kernel: no CUDA graphs")
    cudagraph_capture_sizes: tuple[int, ...] = setting(
        (),
        "rows of the decode steps that are captured as CUDA graphs, such as 1,2,4,8: a step is padded to the next one, and a larger one "
        "runs without a graph (default: 1 to 256 in 14 sizes, as far as max_num_seqs needs)",
        aliases=("cuda-graph-sizes", "cuda-graph-bs"),
        unit="counts",
        range=_COUNT,
    )
    capture_context: int | None = setting(
        None,
        "graphs are captured at start for contexts of up to so many tokens; those of longer ones when they first come, which holds "
        "a step up; 0 captures none at start (default: all)",
        range=Range(0, such="128k"),
    )
    async_scheduling: bool | None = setting(
        None, "launch step k+1 while the device runs step k: two steps in flight (default: on a GPU)"
    )
    record_steps: str | None = setting(
        None,
        "file to which every step's rows and time are appended, for dsv4 simulate --step-model",
        unit="file",
    )
    stuck_after: float = setting(
        300.0,
        "seconds with work at hand and no step ending after which GET /health says 503",
        range=Range(0, float("inf"), open=True, unit="seconds"),
    )
    kv_events_config: Mapping[str, Any] | None = setting(
        None,
        "tell routers of a fleet what is cached, as vLLM does, as JSON: "
        """'{"endpoint": "tcp://127.0.0.1:5557", "replay_endpoint": "tcp://127.0.0.1:5558", "topic": ""}'""",
        unit="json",
    )
    seed: int = setting(
        0, "seed of requests that bring none, and of --load-format dummy", range=Range(-(2**63), 2**63 - 1)
    )
    replay_tokens: int | None = setting(
        None,
        "tokens replayed to rebuild the state; fewer than the default is not exact",
        range=_COUNT,
        core="replay_tokens",
    )

    def __post_init__(self) -> None:
        put_right(self)
        if isinstance(self.step_ms, str) and self.step_ms != "auto":
            raise ConfigError(f"step_ms is {self.step_ms!r}; it takes a number, auto, or none for no limit")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs ({self.max_num_seqs}), "
                "so that every running request gets its token in each step"
            )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the HTTP server needs to know."""

    host: str = setting(
        "127.0.0.1", "address or name to listen on; 0.0.0.0 is every IPv4 address, :: every one"
    )
    port: int = setting(8000, "port to listen on; 0 takes a free one", range=Range(0, 65535))
    uds: str | None = setting(None, "path of a Unix socket to listen on instead of host and port")
    uds_mode: str = setting("660", "permissions of the Unix socket, octal")
    served_model_name: tuple[str, ...] = setting(
        (),
        "names of the model in the API, * in one is any text; answers have the one that was asked for (default: the "
        "directory's name). "
        "Put it after MODEL, as it takes several",
        unit="list",
    )
    any_model_name: bool = setting(False, "take whatever model name a request asks for")
    api_key: str | None = setting(
        None, "bearer token that requests must carry (default: none)", unit="secret"
    )
    keys_file: str | None = setting(
        None,
        "TOML file with tenants, hashes of their keys and their limits; read again at SIGHUP",
        unit="file",
    )
    admin_key: str | None = setting(
        None, "bearer token that opens /admin as well (default: none, and /admin is closed)", unit="secret"
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        "origins of web pages that may use the server from a browser, such as https://chat.example.com; * is any",
        unit="list",
    )
    allow_dump: bool = setting(
        False, "answer GET /dump with the core's state, which holds the prompts of all clients"
    )
    profile_dir: str | None = setting(
        None, "directory for the traces of POST /admin/profile (default: none are taken)", unit="file"
    )
    drain_timeout: float = setting(
        30.0,
        "seconds that running requests may take to end after SIGTERM",
        range=Range(0, 1e9, unit="seconds"),
    )
    drain_delay: float = setting(
        0.0,
        "seconds after SIGTERM in which requests are still taken, while /health already says 503",
        range=Range(0, 1e9, unit="seconds"),
    )
    max_body_bytes: int = setting(
        64 * 2**20, "largest request body", unit="bytes", range=Range(1, float("inf"))
    )
    header_timeout: float = setting(10.0, "seconds in which a request's header must arrive", range=_SECONDS)
    body_timeout: float = setting(
        60.0, "seconds without a byte after which a request's body is given up", range=_SECONDS
    )
    body_min_rate: int = setting(
        4096,
        "bytes a second that a request's body must come at in the mean, once body_timeout is over",
        unit="bytes",
        range=Range(0, float("inf")),
    )
    write_timeout: float = setting(
        60.0, "seconds in which a client must take what is written to it, or 64 KiB of that", range=_SECONDS
    )
    max_connections: int | None = setting(
        None,
        "connections served at the same time (default: 4 for each request of the queue, as files allow)",
        range=_COUNT,
    )
    ping_interval: float = setting(
        5.0, "seconds between keep-alive comments in a stream that has no token yet", range=_SECONDS
    )
    log_level: str = setting("info", "what is logged", choices=("debug", "info", "warning", "error"))
    otlp_traces_endpoint: str | None = setting(
        None, "URL to which a span of each request is posted, for OpenTelemetry (default: none)"
    )
    log_format: str = setting(
        "text", "how it is logged: json has one object per line", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        put_right(self)
        _check_key("api_key", self.api_key)
        _check_key("admin_key", self.admin_key)
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ConfigError("admin_key is the api_key; give each a value of its own")
        for origin in self.allow_origin:
            _check_origin(origin)
        if not re.fullmatch("0?[0-7]{3}", self.uds_mode):
            raise ConfigError(f"uds_mode is {self.uds_mode!r}; it takes three octal digits, such as 660")
        for name in self.served_model_name:
            if not 0 < len(name) <= LONGEST_NAME:
                raise ConfigError(
                    f"served_model_name has {name[:40]!r}; a name has 1 to {LONGEST_NAME} characters"
                )
        if self.uds == "":
            raise ConfigError("uds is empty; it takes the path of a socket")


def _check_origin(origin: str) -> None:
    """Raises ConfigError for what no browser sends as `Origin`, and so would never be allowed."""
    if origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", origin):
        return
    scheme, _, rest = origin.rpartition("://")
    host = rest.split("/")[0].lower()
    near = f"; the nearest is {scheme.lower() or 'https'}://{host}" if host else ""
    raise ConfigError(
        f"allow_origin has {origin!r}; an origin is a scheme and a host, without a path, in lower case{near}"
    )


def _check_key(name: str, key: str | None) -> None:
    """Raises ConfigError for a key that no request could carry, or that every request carries. Never shows it."""
    if key is None:
        return
    if not key.strip():
        held = "empty" if not key else "only white space"
        raise ConfigError(f"{name} is {held}; give a key, or leave the setting out to serve without one")
    if any(c.isspace() or not c.isprintable() for c in key):
        raise ConfigError(f"{name} holds white space or a control character, which no header can carry")


def core_options(config: EngineConfig) -> dict[str, Any]:
    """The options of the core that settings give as they are."""
    named = ((f.metadata["core"], getattr(config, f.name)) for f in dataclasses.fields(config))
    return {name: value for name, value in named if name}


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and where it was found."""

    value: Any
    where: str = ""
    """In front of an error: `DSV4_PORT: `, `config file x.yaml, line 3: `; empty for a flag, whose name the setting has."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one place says of settings."""

    name: str
    """`the command line`, `the environment`, `config file x.yaml`, `profile chat`."""
    values: Mapping[str, Given]


def layers(
    classes: Sequence[type],
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    yaml_path: str | Path | None = None,
) -> list[Layer]:
    """What flags, environment, YAML file and profile say, in this order, of which an earlier one counts. Raises ConfigError for an
    unknown key, with the nearest one."""
    env = os.environ if env is None else env
    known = {f.name for cls in classes for f in dataclasses.fields(cls)}
    told = {k: Given(v) for k, v in (flags or {}).items() if v is not None and k in known}
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): Given(env[name], f"{name}: ")
        for name in env
        if name.startswith(ENV_PREFIX)
    }
    lines = read_yaml(yaml_path) if yaml_path is not None else {}
    file = {k: Given(v, f"config file {yaml_path}, line {line}: ") for k, (v, line) in lines.items()}
    found = [
        Layer("the command line", told),
        Layer("the environment", variables),
        Layer(f"config file {yaml_path}", file),
    ]
    every = _names(EngineConfig, ServerConfig)
    for layer in found[1:]:
        _check_known(layer.values, every)
    which = _merged(found).get("profile")
    if which is not None and not _is_none(which.value):
        found.append(profile_layer(str(which.value), which.where))
    return found


def profile_layer(name: str, where: str = "") -> Layer:
    """The settings of a profile, by name or as a file. Raises ConfigError, with `where` in front if there is no such profile."""
    try:
        found = profiles.read(name)
    except profiles.NoProfile as e:
        raise ConfigError(f"{where}profile {e}") from None
    values = {k: Given(v, found.where(k)) for k, v in found.settings.items()}
    kept = {f.name for cls in (EngineConfig, ServerConfig) for f in dataclasses.fields(cls) if _shared(f)}
    for key, one in values.items():
        if key not in kept and key in _names(EngineConfig, ServerConfig):
            raise ConfigError(
                f"{one.where}{key} is no setting of a profile, which is for any model and shown to all"
            )
    _check_known(values, kept)
    return Layer(f"profile {found.name}", values)


def _shared(f: dataclasses.Field[Any]) -> bool:
    """A setting that may stand in a profile."""
    return f.name not in ("model", "revision", "profile") and f.metadata["unit"] != "secret"


def _names(*classes: type) -> list[str]:
    return [f.name for cls in classes for f in dataclasses.fields(cls)]


def _check_known(given: Mapping[str, Given], known: Sequence[str] | set[str]) -> None:
    for key, one in given.items():
        if key not in known:
            raise ConfigError(f"{one.where}unknown setting {key!r}{why_not(key, sorted(known))}")


def _merged(found: Sequence[Layer]) -> dict[str, Given]:
    return {k: v for layer in reversed(found) for k, v in layer.values.items()}


def load(
    classes: Sequence[type],
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    yaml_path: str | Path | None = None,
) -> list[Any]:
    """One frozen object per class from flags, environment, YAML file and profile. Raises ConfigError, which says where a value
    that cannot be used was found and, for an unknown key, the nearest one."""
    given = _merged(layers(classes, flags, env, yaml_path))
    return [make(cls, given) for cls in classes]


def settle(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> EngineConfig:
    """For commands that have no engine: flags, then the profile that they name, then `defaults`, then those of the table. The
    environment is not read. Raises ConfigError."""
    own = Layer("default", {k: Given(v) for k, v in defaults.items()})
    made: EngineConfig = make(EngineConfig, _merged([*layers([EngineConfig], flags, {}), own]))
    return made


def make(cls: type, given: Mapping[str, Given]) -> Any:
    """A config object. An error says where the setting that it begins with was found."""
    hints, values = get_type_hints(cls), {}
    try:
        for f in dataclasses.fields(cls):
            if f.name in given:
                values[f.name] = convert(f, hints[f.name], given[f.name].value)
        return cls(**values)
    except ConfigError as e:
        name = str(e).split(" ", 1)[0]
        raise ConfigError(f"{given[name].where if name in given else ''}{e}") from None


def _is_none(profile: Any) -> bool:
    """Whether a value of `profile` names none."""
    return str(profile).lower() in ("none", "null")


def with_profile(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of EngineConfig, and those of the profile that they name for all that they leave out. Raises ConfigError, also for
    what is no such field."""
    known = set(_names(EngineConfig))
    for name in values.keys() & set(_names(ServerConfig)):
        raise ConfigError(f"{name} is a setting of dsv4 serve; an engine takes none")
    _check_known({name: Given(value) for name, value in values.items()}, known)
    if _is_none(values.get("profile")):
        return {name: value for name, value in values.items() if name != "profile"}
    of_profile = make(EngineConfig, profile_layer(values["profile"]).values)
    return {f.name: getattr(of_profile, f.name) for f in dataclasses.fields(of_profile)} | values


def sources(
    classes: Sequence[type],
    flags: Mapping[str, Any] | None = None,
    yaml_path: str | Path | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Of every place, the first that counts first and the defaults last: its name, and `setting value` of what counts of it.
    Secrets are not shown, nor defaults that leave a setting open."""
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    found, seen = layers(classes, flags, yaml_path=yaml_path), set[str]()
    below = found[-1].values if found[-1].name.startswith("profile ") else {}
    for layer in found:
        told = []
        for key in (k for k in layer.values if k in fields and k not in seen):
            shown = "given" if fields[key].metadata["unit"] == "secret" else _shown(layer.values[key].value)
            own = layer.values is not below and key in below
            told.append(f"{key} {shown}" + (f" (the profile's is {_shown(below[key].value)})" if own else ""))
        seen.update(layer.values)
        yield layer.name, told
    open_ = (None, ())
    yield (
        "default",
        [f"{k} {_shown(f.default)}" for k, f in fields.items() if k not in seen and f.default not in open_],
    )


def _shown(value: Any) -> str:
    """As a flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def profile_diff(first: str, second: str | None) -> list[tuple[str, str, str]]:
    """(setting, value of the first, value of the second or by default) of all that differ. Raises ConfigError."""
    pair = [_merged([profile_layer(name)] if name is not None else []) for name in (first, second)]
    made = [[make(cls, given) for cls in (EngineConfig, ServerConfig)] for given in pair]
    rows = []
    for one, other in zip(*made, strict=True):
        for f in dataclasses.fields(one):
            a, b = getattr(one, f.name), getattr(other, f.name)
            if a != b:
                rows.append((f.name, _shown(a), _shown(b)))
    return rows
