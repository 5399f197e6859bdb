"""`dsv4 dynamo`: a worker of Dynamo."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
from typing import Any

from dsv4 import garbage, requirements
from dsv4.api import logs
from dsv4.cli.common import LoadProgress, add_settings, note, note_sources, read_settings
from dsv4.cli.signals import ends_at_signal
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError
from dsv4.fleet.settings import DynamoConfig

MISSING = (
    "dsv4 dynamo needs Dynamo, which is not installed; run pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1, then "
    "pip install -r tests/fleet/dynamo.txt of dsv4's sources (docs/fleet.md)"
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "dynamo",
        help="a worker for Dynamo's frontend and router",
        usage="%(prog)s [MODEL] [flags]",
        description="Serves a model to frontends of Dynamo (1.6.1), which render chats, tokenize and route by cached prefixes.",
        epilog="examples:\n  dsv4 dynamo --discovery-dir /tmp/fleet\n"
        "  dsv4 dynamo /models/DeepSeek-V4-Flash --component flash --worker-host 10.0.0.7",
    )
    add_settings(parser, EngineConfig, DynamoConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C has drained the engine."""
    engine_config, config = read_settings(arguments, EngineConfig, DynamoConfig)
    if engine_config.kv_events_config is not None:
        raise ConfigError(
            "kv_events_config is given; leave it out, dsv4 dynamo tells its router of the cache by itself"
        )
    if importlib.util.find_spec("dynamo") is None:
        raise ConfigError(MISSING)
    logs.set_up(config.log_level, config.log_format)
    requirements.check()
    for name, value in config.environment().items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from dsv4.engine.async_engine import AsyncEngine
    from dsv4.fleet.cache_relay import Place

    place = Place() if engine_config.enable_prefix_caching else None
    try:
        if place is not None:
            engine_config = dataclasses.replace(engine_config, kv_events_config=place.config)
        engine = AsyncEngine(engine_config)
        with ends_at_signal(
            "loading the model", place.remove if place is not None else lambda: None
        ) as disarm:
            from dsv4.fleet.dynamo_worker import Dsv4Worker, serve

            with LoadProgress() as progress:
                engine.load(progress)
            for line in engine.describe():
                note(line)
            note_sources(arguments, EngineConfig, DynamoConfig)
            worker = Dsv4Worker(engine, config, place, disarm)
        note(
            f"dynamo     {config.namespace}/{config.component}/{config.endpoint}, discovery {config.discovery_backend}"
        )
        garbage.settle()
        serve(worker)
    finally:
        if place is not None:
            place.remove()
    return 0
