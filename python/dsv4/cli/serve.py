"""`dsv4 serve`: loads the model, prints the plan, answers HTTP."""

from __future__ import annotations

import argparse
import shlex
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsv4 import garbage, requirements
from dsv4.api import logs, tracing
from dsv4.api.connections import check_file_limit, raise_file_limit
from dsv4.api.keys import Keys
from dsv4.api.listen import bind_all, bind_unix, remove_dead
from dsv4.api.loading import Loading
from dsv4.cli.common import LoadProgress, add_settings, note, note_sources, read_settings
from dsv4.cli.signals import ends_at_signal
from dsv4.config import EngineConfig, ServerConfig
from dsv4.errors import ConfigError

if TYPE_CHECKING:
    from dsv4.api.service import Service
    from dsv4.engine.async_engine import AsyncEngine


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="the HTTP server",
        usage="%(prog)s [MODEL] [flags]",
        description="Serves a model over HTTP (OpenAI's and Anthropic's dialects).",
        epilog="examples:\n  dsv4 serve\n  dsv4 serve /models/DeepSeek-V4-Flash --max-model-len 256k --port 9000\n"
        "  dsv4 serve deepseek-ai/DeepSeek-V4-Flash --config dsv4.yaml\n  dsv4 serve /models/DeepSeek-V4-Flash --profile coding-agent",
    )
    add_settings(parser, EngineConfig, ServerConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C has drained the engine."""
    engine_config, server_config = read_settings(arguments, EngineConfig, ServerConfig)
    check_names(arguments.served_model_name, engine_config.model)
    logs.set_up(server_config.log_level, server_config.log_format)
    requirements.check()
    Keys(server_config)  # a file that cannot be read is known before anything slow
    tracing.check(server_config.otlp_traces_endpoint)
    # A reload, or a terminal that closes, while the model loads ends neither this process nor the engine's, which inherits it; the
    # server takes the signal once it is there.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from dsv4.engine.async_engine import AsyncEngine

    engine = AsyncEngine(engine_config)
    sockets: list[socket.socket] = []

    def close() -> None:
        for sock in sockets:
            sock.close()
        if sockets and server_config.uds is not None:
            remove_dead(server_config.uds)

    try:
        with ends_at_signal("loading the model", close):  # before anyone can know that it is there
            try:  # before the slow part, so that a wrong model and a taken port are known at once
                check_file_limit(raise_file_limit(), server_config.max_connections)
                sockets += listen(server_config)
            except BaseException:
                engine.abandon()
                raise
            with Loading(sockets):
                service = load(engine, server_config)
                note_sources(arguments, EngineConfig, ServerConfig)
        places = [sock.getsockname() for sock in sockets]
        serve(service, sockets, lambda: note(ready_text(service, places)))
    finally:
        close()
    return 0


def check_names(given: Sequence[str] | None, model: str | None) -> None:
    """ConfigError where MODEL may have been taken for one of several names."""
    if model is None and given is not None and len(given) > 1:
        raise ConfigError(
            f"served_model_name has {len(given)} words ({', '.join(given)[:80]}) and there is no MODEL, which it may have "
            "taken; put MODEL before it, or write the names with commas between them"
        )


def load(engine: AsyncEngine, server_config: ServerConfig) -> Service:
    """The slow part: the engine's process reads the weights. Prints the plan."""
    from dsv4.api.server import make_server  # noqa: F401  while the process is busy
    from dsv4.api.service import Service

    with LoadProgress() as progress:
        engine.load(progress)
    for line in engine.describe():
        note(line)
    service = Service(engine, server_config, engine.name)
    further = ", and every other" if server_config.any_model_name else ""
    note(f"names      {', '.join((*service.names, *service.patterns))}{further}")
    note(f"server     {service.connections.describe()}")
    note(f"keys       {service.callers.keys.describe()}")
    garbage.settle()
    return service


def serve(service: Service, sockets: Sequence[socket.socket], on_ready: Callable[[], None]) -> None:
    from dsv4.api import server

    server.serve(service, sockets, on_ready)


def listen(config: ServerConfig) -> list[socket.socket]:
    """The listening sockets that the settings ask for. Raises ConfigError."""
    if config.uds is not None:
        return [bind_unix(config.uds, int(config.uds_mode, 8))]
    return bind_all(config.host, config.port)


def ready_text(service: Any, places: Sequence[Any]) -> str:
    """Where to reach the server, and a command that does. `places`: what `getsockname` says of its sockets."""
    urls = [url_of(place) for place in places]
    curl = f"curl {urls[0]}"
    if isinstance(places[0], str):
        curl = f"curl --unix-socket {shlex.quote(places[0])} http://localhost"
    key = " -H 'authorization: Bearer KEY'" if service.callers.keys.required else ""
    if service.engine.tokenizer is None:
        path, body = "/v1/completions", '{"model":"default","prompt":[1,2,3]}'
    else:
        path, body = (
            "/v1/chat/completions",
            '{"model":"default","messages":[{"role":"user","content":"Hello"}]}',
        )
    return f"ready      {' '.join(urls)}\n           {curl}{path}{key} -H 'content-type: application/json' -d '{body}'"


def url_of(place: Any) -> str:
    """What `getsockname` says as a URL that works on this machine: every address is also the loopback one."""
    if isinstance(place, str):
        return f"unix:{place}"
    host, port = place[0], place[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
