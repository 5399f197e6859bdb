"""Every kernel compiles for Hopper and Blackwell, with the matrix instructions of each, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton")

from dsv4.kernels.aot import modules

pytestmark = pytest.mark.timeout(600)
"""A module of many kernels takes a minute of a processor that it has for itself."""

PROCESS = """
import sys
from dsv4.kernels.aot import main

for line in sys.stdin:
    print(line.strip(), "ended with", main([line.strip()]), flush=True)
"""
"""`python -m dsv4.kernels.aot MODULE` for each line of standard input. One process for all, as to load torch and triton takes longer than
most modules do; not this one, where kernels are interpreted."""


@pytest.fixture(scope="module")
def compiles() -> Iterator[Callable[[str], list[str]]]:
    """Compiles the kernels of a module; the lines of its table, and how it ended."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    given, told = process.stdin, process.stdout
    assert given is not None and told is not None

    def one(module: str) -> list[str]:
        print(module, file=given, flush=True)
        lines: list[str] = []
        while not lines or not lines[-1].startswith(f"{module} ended with "):
            line = told.readline()
            assert line, f"the process is gone, it ended with {process.wait()}: {''.join(lines)}"
            lines.append(line)
        return lines

    with process:
        yield one
        given.close()


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith(".common")])
def test_compiles_for_hopper_and_blackwell(compiles: Callable[[str], list[str]], module: str) -> None:
    *table, ended = compiles(module)
    assert ended == f"{module} ended with 0\n", "".join(table)
