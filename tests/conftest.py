"""Settings for all tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

# Worker threads of torch sleep instead of spinning, here and in servers that tests start: a busy machine with few cores
# is otherwise slowed down tenfold. Read when torch is loaded, so it is set before anything imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU the kernels run in Triton's interpreter, which must be known before triton is loaded.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns where this is not said; it is what all versions do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# What a request may take where a test says nothing: httpx's own 5 s are too short for a busy machine with few cores. This
# object is the default of all its functions and clients, so it is changed in place.
DEFAULT_TIMEOUT_CONFIG.connect = DEFAULT_TIMEOUT_CONFIG.read = 60.0
DEFAULT_TIMEOUT_CONFIG.write = DEFAULT_TIMEOUT_CONFIG.pool = 60.0


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that runs the command line in this process sets up logging for all: the next one has it as before."""
    named = [logging.getLogger(name) for name in (None, "uvicorn", "asyncio")]
    levels = [logger.level for logger in named]
    yield
    for logger, level in zip(named, levels, strict=True):
        logger.setLevel(level)
    logs = sys.modules.get("dsv4.api.logs")
    for handler in list(named[0].handlers):
        if logs is not None and isinstance(handler, logs.LogWriter):
            named[0].removeHandler(handler)
            handler.close()
