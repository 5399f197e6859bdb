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


LONGEST = (
    "kernels/test_aot.py",
    "e2e/test_ranks.py",
    "model/test_ranks.py",
    "e2e/test_reuse.py",
    "e2e/test_rolling_restarts.py",
    "e2e/test_serving_ranks.py",
    "e2e/test_serve.py",
    "e2e/test_nano_quality.py",
    "kernels/test_compiling.py",
    "e2e/test_nano.py",
    "model/test_checkpoint_files.py",
    "e2e/test_fork_and_park.py",
    "kernels/test_moe.py",
)
"""Files that take 40 seconds of a processor and more. They come first: one that begins when the others end, as do those of few tests in
xdist's own order, would hold up the end of a run whose workers take a file at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(map(Path.exists, places)), "LONGEST names a file that is not there"
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
