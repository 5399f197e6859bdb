"""`dsv4 serve` whose device is lost: every stream ends with an error, and the process ends with a line and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

from tests.support.engines import write_tiny

SERVE = """
import itertools, sys
import torch
from dsv4.cli import main
from dsv4.engine.device import LocalDevice

run, count = LocalDevice.launch, itertools.count()
def breaks(self, *arguments):
    if next(count) == 20:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nmore of it")
    return run(self, *arguments)
LocalDevice.launch = breaks
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_lost_device_ends_the_server(tmp_path: Path) -> None:
    model = str(write_tiny(tmp_path / "tiny"))
    options = ["--num-pages", "64", "--max-num-seqs", "2", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, model, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("ready"))
        url = ready.split()[1]
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "illegal memory access" in lines[-2] and '"error"' in lines[-2] and lines[-1] == "data: [DONE]"
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("dsv4: error: the engine has stopped: the device is lost: CUDA error: an illegal")
