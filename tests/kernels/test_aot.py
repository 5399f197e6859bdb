"""Every kernel compiles for Hopper and Blackwell, with the matrix instructions of each, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from dsv4.kernels.aot import modules


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith(".common")])
def test_compiles_for_hopper_and_blackwell(module: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dsv4.kernels.aot", module]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
