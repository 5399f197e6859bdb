"""`dsv4 serve`: loads the model, prints the plan, answers HTTP."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from dsv4.cli.common import LoadProgress, add_settings, note, read_settings
from dsv4.config import EngineConfig, ServerConfig


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "serve", help="the HTTP server", description="Serves a model over HTTP (OpenAI's dialect)."
    )
    add_settings(parser, EngineConfig, ServerConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C has drained the engine."""
    engine_config, server_config = read_settings(arguments, EngineConfig, ServerConfig)
    set_up_logging(server_config.log_level)
    from dsv4.api.listen import bind

    # Before the slow part, so that a taken port is known at once.
    sock = bind(server_config.host, server_config.port)
    from dsv4.api.server import serve
    from dsv4.api.service import Service
    from dsv4.engine.async_engine import AsyncEngine

    with LoadProgress() as progress:
        engine = AsyncEngine.from_config(engine_config, progress)
    for line in engine.describe():
        note(line)
    service = Service(engine, server_config, engine.built.name)
    serve(service, sock, on_ready=lambda: note(ready_text(service, sock.getsockname())))
    return 0


def ready_text(service: Any, address: tuple[Any, ...]) -> str:
    """Where to reach the server, and a command that does."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        address[0], f"[{address[0]}]" if ":" in address[0] else address[0]
    )
    url = f"http://{host}:{address[1]}"
    key = " -H 'authorization: Bearer KEY'" if service.config.api_key is not None else ""
    if service.engine.tokenizer is None:
        path, body = "/v1/completions", '{"model":"default","prompt":[1,2,3]}'
    else:
        path, body = (
            "/v1/chat/completions",
            '{"model":"default","messages":[{"role":"user","content":"Hello"}]}',
        )
    return (
        f"ready      {url}\n           curl {url}{path}{key} -H 'content-type: application/json' -d '{body}'"
    )


def set_up_logging(level: str) -> None:
    """One line per event on standard error. Prompts and answers are never logged."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
