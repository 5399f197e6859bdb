"""Engines and servers over the scripted process, and what is left of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4.engine import remote

ROOT = Path(__file__).parents[2]
SCRIPTED = "tests.support.scripted_process"

SERVE = """
import sys
from dsv4.cli import main
from dsv4.engine import remote

remote.PROCESS = "tests.support.scripted_process"
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""
"""A script: `dsv4 serve` over the scripted process, on a free port."""

OPTIONS = ("--num-pages", "64", "--max-num-seqs", "2", "--block-size", "128")


def python_path() -> str:
    """PYTHONPATH of processes that are to find this folder, and every package that this process finds."""
    return os.pathsep.join([str(ROOT), *filter(None, sys.path)])


def environment(**settings: object) -> dict[str, str]:
    """For processes that are to find this folder; `settings` as SCRIPTED_…"""
    told = {f"SCRIPTED_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "PYTHONPATH": python_path(), **told}


@contextmanager
def scripted(**settings: object) -> Iterator[None]:
    """Engines that are started meanwhile are scripted."""
    before, kept = dict(os.environ), remote.PROCESS
    os.environ.update(environment(**settings))
    remote.PROCESS = SCRIPTED
    try:
        yield
    finally:
        remote.PROCESS = kept
        os.environ.clear()
        os.environ.update(before)


def children(of: int) -> list[int]:
    """Processes that a process has started and that are still there, zombies too."""
    return [pid for pid, (_, parent) in _processes() if parent == of]


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    return any(pid == found and state != "Z" for found, (state, _) in _processes())


def _processes() -> Iterator[tuple[int, tuple[str, int]]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        yield int(path.parent.name), (state, int(parent))
