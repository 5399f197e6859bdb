"""What a worker of a fleet needs to know beside its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.errors import ConfigError
from dsv4.quantities import Range
from dsv4.settings import put_right, setting


@dataclass(frozen=True, slots=True)
class DynamoConfig:
    """How a worker meets the frontends of Dynamo."""

    served_model_name: Sequence[str] = setting(
        (),
        "names of the model for clients (default: the directory's name). Put it after MODEL, as it takes several",
        unit="list",
    )
    namespace: str = setting("dynamo", "Dynamo's namespace: frontends of one see its workers")
    component: str = setting(
        "backend", "name of the group of workers with the same model and settings; each model needs its own"
    )
    endpoint: str = setting("generate", "name of the endpoint")
    discovery_backend: str = setting(
        "file",
        "where workers and frontends find each other: file is a directory that all of them see",
        choices=("file", "etcd"),
    )
    discovery_dir: str | None = setting(
        None, "that directory (default: DYN_FILE_KV, which frontends read, or Dynamo's own)", unit="file"
    )
    worker_host: str = setting(
        "127.0.0.1",
        "address of this machine at which frontends reach the worker, and where it listens for requests",
    )
    metrics_port: int | None = setting(
        None,
        "port of /metrics, /health and /live, on worker_host; Dynamo takes none above 32767 (default: none)",
        range=Range(1, 32767),
    )
    drain_timeout: float = setting(
        30.0,
        "seconds that running requests may take to end after SIGTERM and Dynamo's grace period",
        range=Range(0, 1e9, unit="seconds"),
    )
    log_level: str = setting("info", "what is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = setting(
        "text", "how it is logged: json has one object per line", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        put_right(self)
        for name in ("namespace", "component", "endpoint", "worker_host"):
            if not getattr(self, name).strip():
                raise ConfigError(
                    f"{name} is empty; leave it out for {type(self).__dataclass_fields__[name].default!r}"
                )
        if self.discovery_dir is not None and self.discovery_backend != "file":
            raise ConfigError(
                f"discovery_dir is {self.discovery_dir!r}, but discovery_backend is {self.discovery_backend!r}; it goes with file"
            )
        for name in self.served_model_name:
            if "*" in name or not name:
                raise ConfigError(
                    f"served_model_name has {name[:40]!r}; frontends take whole names only, without *"
                )

    def environment(self) -> dict[str, str]:
        """What Dynamo reads from the environment alone; values that are there already come first."""
        made = {
            "DYN_TCP_RPC_HOST": self.worker_host,
            "DYN_EVENT_PLANE_HOST": self.worker_host,
            "DYN_REQUEST_PLANE": "tcp",
        }
        made |= {"DYN_EVENT_PLANE": "zmq", "DYN_DISCOVERY_BACKEND": self.discovery_backend}
        made["DYN_LOG"] = {"warning": "warn"}.get(self.log_level, self.log_level)
        if self.log_format == "json":
            made["DYN_LOGGING_JSONL"] = "1"
        if self.metrics_port is not None:
            made |= {"DYN_SYSTEM_HOST": self.worker_host, "DYN_SYSTEM_PORT": str(self.metrics_port)}
        if self.discovery_dir is not None:
            made["DYN_FILE_KV"] = self.discovery_dir
        return made
