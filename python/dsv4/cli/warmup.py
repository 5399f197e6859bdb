"""`dsv4 warmup`: compiles what a server with these settings needs, and leaves it in the cache on disk."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from typing import Any

from dsv4.cli.common import add_settings, note, read_settings
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile the kernels that a server needs, without serving",
        usage="%(prog)s [MODEL] [flags]",
        description="Starts the engine on the GPU, which compiles all kernels into Triton's cache on disk (TRITON_CACHE_DIR), and ends. "
        "A server with the same settings, on a machine with such a GPU and that cache, compiles nothing. With --load-format dummy no "
        "weights are read, for a checkpoint in the formats of the release.",
        epilog="examples:\n  dsv4 warmup /models/DeepSeek-V4-Flash\n  TRITON_CACHE_DIR=/cache dsv4 warmup /models/DeepSeek-V4-Flash "
        "--max-model-len 256k",
    )
    add_settings(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints how many kernels there are and where. Raises ConfigError where nothing is compiled."""
    from dsv4.cli.talking import load_model

    (config,) = read_settings(arguments, EngineConfig)
    if config.device != "cuda":
        import torch

        if config.device == "cpu" or not torch.cuda.is_available():
            why = "device is cpu" if config.device == "cpu" else "torch sees no CUDA device"
            raise ConfigError(f"nothing is compiled: {why}; run it on a machine with the GPU that will serve")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Graphs belong to a process: none would be left.
    load_model(dataclasses.replace(config, capture_context=0))
    from dsv4.kernels.compiling import cache_dir

    note(f"kernels are in {cache_dir()}")
    return 0
